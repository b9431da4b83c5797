//! Whatever ends or is taken away at a gateway whose default route leads over the carrier, no private packet leaves in clear.

mod bed;
mod events;
mod orphans;
