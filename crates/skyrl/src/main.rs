//! The `skyrl` command line.

fn main() {}
