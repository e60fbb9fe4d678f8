//! What the linker of these programs is told, and of those of the benchmarks.

fn main() {
    // Without this LLVM expands `memcpy` alone, and makes every other copy and every zeroing a call to a loop over single bytes.
    if std::env::var("CARGO_CFG_TARGET_ARCH").is_ok_and(|arch| arch == "bpf") {
        println!("cargo:rustc-link-arg-bins=--disable-expand-memcpy-in-order");
    }
}
