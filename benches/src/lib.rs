//! Benchmarks of the packet path and of the control path.
