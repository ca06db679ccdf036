//! Load generator for Hubcast.
fn main() {}
