"""Small programs whose evidence is known by quadrature or enumeration."""
