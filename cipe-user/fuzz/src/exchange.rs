//! Any sequence of events: a key is used only after its acknowledgement and accepted only once, and timers go forward.

use std::collections::HashSet;
use std::time::Duration;

use arbitrary::Arbitrary;
use cipe_user::ciped::exchange::{Action, Exchange, Input, Now, TakenKeys};
use cipe_user::control::protocol::Wanted;
use cipe_user::wire::message::{DynamicKey, Message};
use rand::SeedableRng;
use rand::rngs::StdRng;

use crate::read;

#[derive(Arbitrary, Debug)]
enum Op {
    Wanted(u8),
    Indication(u8),
    /// Acknowledges the last announcement, if there is one.
    Acknowledgement,
    Payload(Vec<u8>),
    Wait(u16),
    Deadline,
}

const WANTED: [Wanted; 6] =
    [Wanted::NoSendKey, Wanted::Age, Wanted::Packets, Wanted::Octets, Wanted::NoReceiveKey, Wanted::ReceiveKeySpent];

/// Runs one input.
pub fn run(input: &[u8]) {
    let Some(input) = read::<(u8, Vec<(bool, Op)>)>(input) else { return };
    let (tokxc, ops) = input;
    let mut exchange =
        Exchange::new(Duration::from_secs(tokxc.into()), TakenKeys::new([0; 16]), StdRng::seed_from_u64(1));
    let mut now = Duration::ZERO;
    let (mut sending, mut announced, mut taken) = (false, None::<DynamicKey>, HashSet::new());
    for (under_static, op) in ops {
        let message = |message| Input::Message { message, under_static };
        let payload;
        let input = match op {
            Op::Wanted(reason) => Input::KeyWanted(WANTED[usize::from(reason) % WANTED.len()]),
            Op::Indication(key) => message(Message::indication(&DynamicKey([key; 16]))),
            Op::Acknowledgement => {
                let Some(key) = &announced else { continue };
                message(Message::Acknowledgement { sum: key.sum() })
            }
            Op::Payload(octets) => {
                payload = octets;
                let Ok(parsed) = Message::parse(&payload) else { continue };
                message(parsed)
            }
            Op::Wait(ms) => {
                now += Duration::from_millis(ms.into());
                Input::Tick
            }
            Op::Deadline => {
                now = now.max(exchange.deadline().unwrap_or_default());
                Input::Tick
            }
        };
        let ticked = matches!(input, Input::Tick);
        let actions = exchange.handle(input, Now { at: now, unix_nanos: 0 });
        assert!(actions.len() <= 8);
        for action in actions {
            match action {
                Action::SendMessage { payload, .. } => {
                    let Ok(message) = Message::parse(&payload) else { panic!("sends what is no message") };
                    if let Message::Indication { key, .. } = message {
                        announced = Some(key);
                    }
                }
                Action::SetSendKey(key) => {
                    assert!(announced.as_ref().is_some_and(|last| last.0 == *key));
                    sending = true;
                }
                Action::DropSendKey => assert!(std::mem::take(&mut sending)),
                Action::SetReceiveKey { key, .. } => assert!(taken.insert(*key)),
                Action::PeerSeals { .. } | Action::Log(_) => {}
            }
        }
        if ticked {
            assert!(exchange.deadline().is_none_or(|next| next > now));
        }
    }
}
