//! The single-threaded process that clones the native engine's sandboxes.

fn main() {}
