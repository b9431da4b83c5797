//! CIPE for today's Linux. Rooms, lower to upper; a room never imports one that stands later:
//! `cipher`, `xsk` < `wire`, `kernel`, `control` < `engine`, `ciped` < `cli`.

pub mod ciped;
pub mod cipher;
pub mod cli;
pub mod control;
pub mod engine;
pub mod kernel;
pub mod wire;
pub mod xsk;
