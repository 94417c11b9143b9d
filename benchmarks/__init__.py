"""Speed, memory and statistical quality of this package beside its peers; not part of the installed package.

``harness`` measures, ``systems`` are measured, ``quality`` scores their results, ``choice`` compares what could be the
default, ``rows`` are the rows of the tables, and ``truth`` checks inference. Each folder imports only from those named
before it. The commands, each with ``--help``:

    python -m benchmarks cpu                      speed, memory and time to quality beside scvi-tools
    python -m benchmarks gpu                      the same on a CUDA device, and whether it agrees with the CPU
    python -m benchmarks truth                    inference against quadrature, exact arithmetic and known latents
    python -m benchmarks.choice.beside_peer       the default model beside scvi-tools on seven data sets
    python -m benchmarks.choice.defaults          variants of the default model, by held-out evidence
    python -m benchmarks.choice.figure            the figure of docs/default.md, from files of such fits
    python -m benchmarks.choice.integration       batches removed by it and by scvi-tools, scored by mixing and types
    python -m benchmarks.choice.spaces            where neighbours are sought, by molecules that the fit has not seen
    python -m benchmarks.rows.atlas               an atlas of simulated cells from end to end
    python -m benchmarks.rows.memory              peak memory of every public function of a fit
    python -m benchmarks.rows.stores              counts larger than memory
    python -m benchmarks.quality.baselines        the paper's baselines
    python -m benchmarks.quality.calibration      simulation-based calibration of the samplers
    python -m benchmarks.quality.calls            calls of genes where it is known which differ
    python -m benchmarks.quality.differential     differential expression against microarrays
    python -m benchmarks.quality.distributed      training by several processes
    python -m benchmarks.quality.evidence         held-out evidence
    python -m benchmarks.quality.labels           predicted labels where few are known
    python -m benchmarks.quality.global_draws     evidence at the medians of random weights, and averaged over them
    python -m benchmarks.quality.posterior        posterior samplers on held-out cells
"""
