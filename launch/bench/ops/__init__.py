"""The parts of `launch.bench.kernels`: a target or an op each."""
