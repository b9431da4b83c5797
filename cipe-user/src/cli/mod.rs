//! The command line for people.

<<<<<<< HEAD
pub mod decode;
pub mod vectors;
=======
pub mod bench_cipher;
>>>>>>> cipher
