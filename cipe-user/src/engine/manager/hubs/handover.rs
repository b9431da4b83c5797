//! Hubs that pass from one engine to the next. The next one holds descriptors of what serves them. So the other one dies at once, where
//! the kernel would close one after the other first, and wait some ten milliseconds for each. Then the next one closes the sockets all
//! together, and puts its programs in the place of the other's on the same links.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::watch;

use super::open::OpenHub;
use crate::control::protocol::{Descriptor, Event, HubPart};
use crate::engine::manager::platform::Platform;
use crate::kernel::bpf::{PairLinks, XdpMode};
use crate::kernel::hub::Hub;

/// The events that tell another engine of an open hub; none if descriptors are short.
pub(crate) fn events_of(platform: &Platform, hub: &Hub, open: &OpenHub) -> Vec<Event> {
    let Some(PairLinks { tc, xdp }) = platform.programs().pair_links(hub.index) else { return Vec::new() };
    let links = tc.map(|tc| (HubPart::TcLink, tc)).into_iter().chain([(HubPart::XdpLink, xdp)]);
    let sockets = open.sockets.iter().filter_map(|(part, socket)| Some((*part, socket.try_clone().ok()?)));
    let part = |(part, descriptor)| Event::HubPart {
        hidden: hub.hidden_index,
        part,
        descriptor: Some(Descriptor(Arc::new(descriptor))),
    };
    links.chain(sockets).map(part).chain([Event::Hub { hub: hub.clone(), mode: open.mode }]).collect()
}

/// What another engine has told of its hubs.
#[derive(Default)]
pub(crate) struct Handover {
    hubs: BTreeMap<u32, Handed>,
    /// Tells when the queues are free.
    closed: Option<Closed>,
}

/// Has no value, and ends when all sockets of the other engine are closed.
pub(crate) type Closed = watch::Receiver<()>;

/// A hub of another engine.
#[derive(Default)]
struct Handed {
    tc: Option<OwnedFd>,
    xdp: Option<OwnedFd>,
    queues: Vec<OwnedFd>,
    /// How many there were.
    queue_count: u32,
    injectors: Vec<OwnedFd>,
    /// The hub, and the mode of its programs, when all parts are there.
    hub: Option<(Hub, XdpMode)>,
}

/// The links of the other engine on a hub, and what its queues wait for.
pub(crate) struct Former {
    pub links: PairLinks,
    /// The mode of its programs.
    pub mode: XdpMode,
    /// How many queues it has served.
    pub queues: u32,
    pub closed: Option<Closed>,
}

impl Handover {
    /// Takes what the other engine tells of a hub; other events are ignored.
    pub(crate) fn take(&mut self, event: Event) {
        match event {
            Event::HubPart { hidden, part, descriptor: Some(descriptor) } => {
                let Some(descriptor) = Arc::into_inner(descriptor.0) else { return };
                let handed = self.hubs.entry(hidden).or_default();
                match part {
                    HubPart::TcLink => handed.tc = Some(descriptor),
                    HubPart::XdpLink => handed.xdp = Some(descriptor),
                    HubPart::Queue => {
                        handed.queues.push(descriptor);
                        handed.queue_count += 1;
                    }
                    HubPart::Injector => handed.injectors.push(descriptor),
                }
            }
            Event::Hub { hub, mode } => {
                let handed = self.hubs.entry(hub.hidden_index).or_default();
                handed.hub = Some((hub, mode));
            }
            Event::HubGone { hidden } => drop(self.hubs.remove(&hidden)),
            _ => {}
        }
    }

    /// Closes the sockets of the other engine, which has ended, each on a thread of its own.
    pub(crate) fn release(&mut self) {
        let (open, closed) = watch::channel(());
        let open = Arc::new(open);
        self.closed = Some(closed);
        for handed in self.hubs.values_mut() {
            for queue in std::mem::take(&mut handed.queues) {
                let open = open.clone();
                std::thread::spawn(move || {
                    drop(queue);
                    drop(open);
                });
            }
            let injectors = std::mem::take(&mut handed.injectors);
            std::thread::spawn(move || drop(injectors));
        }
    }

    /// The hubs that are set up as the other engine has left them.
    pub(crate) fn hubs(&self) -> Vec<Hub> {
        self.hubs.values().filter_map(|handed| Some(handed.hub.as_ref()?.0.clone())).collect()
    }

    /// The links of a hub, if they are known.
    pub(crate) fn former(&mut self, hub: &Hub) -> Option<Former> {
        let Handed { tc, xdp, queue_count, hub: told, .. } = self.hubs.remove(&hub.hidden_index)?;
        let (_, mode) = told.filter(|(told, _)| told == hub)?;
        Some(Former { links: PairLinks { tc, xdp: xdp? }, mode, queues: queue_count, closed: self.closed.clone() })
    }
}
