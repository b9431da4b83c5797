//! The engine: tunnels, the packet path and its workers.
