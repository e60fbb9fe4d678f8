//! The configuration file: both kinds of documents, their checks, and that what is written is read back.
#![no_main]

libfuzzer_sys::fuzz_target!(|text: &str| {
    let _config = trama_proxy::config::fuzzing::configuration(text);
});
