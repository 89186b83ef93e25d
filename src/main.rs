//! flags to a command, result to an exit code
fn main() {}
