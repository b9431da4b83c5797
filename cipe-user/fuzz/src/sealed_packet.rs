//! Any payload is opened as it was sealed, once; any datagram gets a verdict; counters near the newest one are understood.

use std::sync::atomic::AtomicU64;

use arbitrary::Arbitrary;
use cipe_user::sealed::cipher::{Key, Suite};
use cipe_user::sealed::counter;
use cipe_user::sealed::direction::{ReceiveKey, SendKey};
use cipe_user::sealed::packet::{self, Content, Epoch, HEADROOM, Header, OVERHEAD};
use cipe_user::sealed::window::{WINDOW, Window};

use crate::read;

#[derive(Arbitrary, Debug)]
struct Case {
    key: [u8; 32],
    aes: bool,
    epoch: u8,
    next: u64,
    /// How far the newest counter of the receiver is from `next`.
    ahead: i32,
    control: bool,
    flip: (u16, u8),
    octets: Vec<u8>,
}

/// Runs one input.
pub fn run(input: &[u8]) {
    let Some(case) = read::<Case>(input) else { return };
    let suite = if case.aes { Suite::Aes256Gcm } else { Suite::ChaCha20Poly1305 };
    let epoch = Epoch::ALL[usize::from(case.epoch % 3)];
    let content = if case.control { Content::Control } else { Content::Data };
    let key = || Key::new(suite, &case.key);
    let octets = &case.octets;

    let window = Window::default();
    let newest = case.next.saturating_add_signed((case.ahead >> 3).into()).min(counter::END - 1);
    window.accept(newest).expect("nothing is in the window");
    let receive = ReceiveKey::new(key(), window);
    let send = SendKey::new(key(), epoch, Box::new(AtomicU64::new(case.next)));
    let mut sealed = vec![0; octets.len() + OVERHEAD];
    sealed[HEADROOM..HEADROOM + octets.len()].copy_from_slice(octets);
    let sent = send.batch(1).seal(content, &mut sealed, octets.len());
    assert_eq!(sent.is_some(), case.next < counter::END);
    if sent.is_some() {
        assert!(packet::is_sealed(&sealed));
        let Ok(Header::Packet(read, low)) = packet::parse(&sealed) else { panic!("a sealed packet has a header") };
        assert_eq!(read, epoch);
        let mut changed = sealed.clone();
        let at = usize::from(case.flip.0) % changed.len();
        changed[at] ^= case.flip.1.max(1);
        assert!(receive.open(low, &mut changed).is_err());
        let mut opened = sealed.clone();
        let result = receive.open(low, &mut opened);
        let is_fresh = case.next != newest && case.next + WINDOW > newest;
        assert_eq!(result.is_ok(), is_fresh, "{} at {newest}", case.next);
        if let Ok((read, place)) = result {
            assert_eq!((read, &opened[place]), (content, &octets[..]));
            assert!(receive.open(low, &mut sealed).is_err(), "opened twice");
        }
    }

    if let Ok(Header::Packet(_, low)) = packet::parse(octets) {
        assert!(receive.open(low, &mut octets.clone()).is_err(), "a forgery");
    }
}
