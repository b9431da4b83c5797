//! The command line for people.

pub mod decode;
pub mod vectors;
