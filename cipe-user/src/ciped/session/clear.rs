//! Control messages in clear: anybody can send them, so they are only logged, and a request for our configuration is
//! answered. Without a key, a CT_PING is answered, too.

use std::net::SocketAddr;
use std::time::Duration;

use rand::CryptoRng;

use super::{Level, Session, Step, Topic};
use crate::ciped::exchange::Now;
use crate::ciped::options::Options;
use crate::control::protocol::{Cipher, Request};
use crate::kernel::zone::Shown;
use crate::wire::clear::{self, Clear, Configuration};
use crate::wire::message::Message;

/// Minimum time between two answers to requests for the configuration.
const MIN_ANSWER_INTERVAL: Duration = Duration::from_secs(1);
/// Minimum time between two answers to CT_PINGs.
const MIN_PONG_INTERVAL: Duration = Duration::from_millis(100);

/// The release whose behaviour this daemon has: the first with the option `cipher`.
const RELEASE: [u8; 2] = [1, 6];

/// The configuration of this end.
pub(super) fn configuration(options: &Options) -> Configuration {
    let cipher = match options.cipher {
        Cipher::Blowfish => b'b',
        Cipher::Idea | Cipher::IdeaLittle => b'i',
    };
    Configuration { protocol: options.protocol.number(), cipher, release: RELEASE, reads_letters: !options.keybug }
}

impl<R: CryptoRng> Session<R> {
    /// Handles a datagram in clear.
    pub(super) fn clear(&mut self, datagram: &[u8], to: SocketAddr, now: Now) -> Vec<Step> {
        let from = Shown(to);
        let (kind, configuration, asks) = match Clear::parse(datagram) {
            Clear::Request(configuration) => ("CT_CONFREQ", configuration, true),
            Clear::Answer(configuration) => ("CT_CONF", configuration, false),
            Clear::Forbidden(name) => {
                let text = format!("refused {name} in clear from {from}; anybody can send it without the key");
                return self.tell(Topic::Forbidden, Level::Warning, &text, now);
            }
            Clear::Ping(data) if self.nokey => {
                if self.pong_sent.is_some_and(|last| now.at < last + MIN_PONG_INTERVAL) {
                    return Vec::new();
                }
                self.pong_sent = Some(now.at);
                let pong = clear::datagram(&Message::Pong(data), now.unix_seconds(), &mut self.rng);
                return vec![Step::Send(Request::SendClear { datagram: pong[..].into(), to })];
            }
            // The engine has read it.
            Clear::Pong(_) if self.nokey => return Vec::new(),
            Clear::Ping(_) | Clear::Pong(_) | Clear::Other => {
                let text = format!("dropped a datagram in clear from {from}");
                return self.tell(Topic::Unreadable, Level::Debug, &text, now);
            }
        };
        let mut steps = match configuration.map(|theirs| self.configuration.mismatches(&theirs)) {
            None => {
                let text = format!("{kind} in clear from {from} cannot be read");
                self.tell(Topic::Unreadable, Level::Info, &text, now)
            }
            Some(mismatches) if mismatches.is_empty() => Vec::new(),
            Some(mismatches) => {
                let text = format!(
                    "{from} is set up in another way, as it says in clear: {}; set up both ends alike",
                    mismatches.join("; ")
                );
                self.tell(Topic::Mismatch, Level::Warning, &text, now)
            }
        };
        if asks && self.configuration_told.is_none_or(|last| now.at >= last + MIN_ANSWER_INTERVAL) {
            self.configuration_told = Some(now.at);
            let datagram = self.configuration.answer(now.unix_seconds(), &mut self.rng);
            steps.push(Step::Send(Request::SendClear { datagram: datagram[..].into(), to }));
        }
        steps
    }
}
