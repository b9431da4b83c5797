//! Key-exchange and control messages (protocol section 3).
