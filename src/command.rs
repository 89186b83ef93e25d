//! The commands of the program, one module each. A command takes plain values and prints to what it is given;
//! what the flags are called, and which exit code an error becomes, is main's.

pub mod migrate;
