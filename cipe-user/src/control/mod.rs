//! What daemon and engine say to each other over the control socket, the image of the old ioctls.
//!
//! Knows no packets and no keys' use. May import `cipher` for names; imported by `engine`, `ciped` and `cli`.

pub mod protocol;
