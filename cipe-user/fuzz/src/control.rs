//! The control protocol: any octets are a message or not; a message that is written and read again is the same.

use cipe_user::control::channel::{decode, encode};
use cipe_user::control::protocol::{Event, Request};

/// Runs one input.
pub fn run(input: &[u8]) {
    if let Ok(request) = decode::<Request>(input)
        && let Ok(written) = encode(&request)
    {
        assert_eq!(decode::<Request>(&written).ok(), Some(request));
    }
    if let Ok(event) = decode::<Event>(input)
        && let Ok(written) = encode(&event)
    {
        assert_eq!(decode::<Event>(&written).ok(), Some(event));
    }
}
