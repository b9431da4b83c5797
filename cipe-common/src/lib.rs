//! Definitions that the eBPF programs and user space share: map layouts, the frame stamp and the verdicts.
//!
//! May be imported by every crate; imports nothing. All types here are plain old data without padding.

#![no_std]

pub mod maps;
pub mod shield;
pub mod stamp;
pub mod verdict;

pub use stamp::{EthernetStamp, Stamp};
pub use verdict::Verdict;
