//! Services, EndpointSlices and Nodes as JSON, up to the decided ServicePorts.
#![no_main]

libfuzzer_sys::fuzz_target!(|json: &[u8]| {
    let _ports = trama_proxy::source::fuzzing::objects(json);
});
