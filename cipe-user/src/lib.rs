//! CIPE for today's Linux. Rooms, lower to upper; a room never imports one that stands later:
//! `repeats`, `cipher`, `xsk`, `inner` < `wire`, `kernel`, `control` < `engine`, `ciped` < `cli`.

pub mod ciped;
pub mod cipher;
pub mod cli;
pub mod control;
pub mod engine;
pub mod inner;
pub mod kernel;
pub mod repeats;
pub mod wire;
pub mod xsk;
