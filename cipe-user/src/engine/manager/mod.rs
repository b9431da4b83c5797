//! The control thread: connections, devices, maps and routes. No packet passes through it but key exchange.

mod attach;
mod carriers;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cipe_common::Verdict;
use cipe_common::maps::Slot;
use tokio::sync::mpsc;

use super::counters::Counters;
use super::worker::{self, Command, Handle};
use crate::control::protocol::{Cipher, Event, Request, Status};
use crate::control::server::{self, Server};
use crate::kernel::bpf::{LoadOptions, Programs, XdpPreference};
use crate::kernel::device::Device;
use crate::kernel::keys::KeyWriter;
use crate::kernel::nexthop::{NextHop, NextHops};
use crate::kernel::netlink::Netlink;
use crate::kernel::watch::LinkEvent;
use crate::xsk::{Umem, UmemConfig};
use carriers::Carriers;

/// How the engine was asked to run.
#[derive(Clone, Debug)]
pub struct EngineOptions {
    /// Stay when the last tunnel has gone.
    pub stay: bool,
    /// Which XDP mode to ask for.
    pub xdp_mode: XdpPreference,
    /// Tunnels that the maps are made for.
    pub max_tunnels: u32,
    /// UMEM frames of 4096 octets.
    pub frames: u32,
}

impl Default for EngineOptions {
    fn default() -> Self {
        Self { stay: false, xdp_mode: XdpPreference::Auto, max_tunnels: 256, frames: 16_384 }
    }
}

/// How long an engine without any tunnel waits for its first one.
const FIRST_TUNNEL: Duration = Duration::from_secs(10);

/// One tunnel as the control thread sees it.
struct Tenant {
    connection: u64,
    device: Device,
    cipher: Cipher,
    me: SocketAddr,
    peer: Option<SocketAddr>,
    counters: Arc<Counters>,
    /// Carrier device in use for sending, by ifindex.
    carrier: Option<u32>,
    /// When the previous receive key is forgotten.
    previous_until: Option<Instant>,
    notes: Vec<String>,
}

struct Manager {
    options: EngineOptions,
    programs: Programs,
    keys: KeyWriter,
    netlink: Netlink,
    next_hops: NextHops,
    umem: Umem,
    worker: Handle,
    carriers: Carriers,
    tenants: HashMap<u16, Tenant>,
    connections: HashMap<u64, server::Sender>,
}

/// What the connections' tasks tell the manager.
enum Said {
    Request(u64, Request),
    Closed(u64),
}

/// Runs the engine until its last tunnel has gone, or SIGTERM or SIGINT.
///
/// `ready` is called once, when daemons can connect.
///
/// # Errors
/// One line that says what was refused, where, and how to go on: no root, no AF_XDP, another engine, no memory.
pub fn run(options: EngineOptions, ready: impl FnOnce()) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(serve(options, ready))
}

async fn serve(options: EngineOptions, ready: impl FnOnce()) -> anyhow::Result<()> {
    let mut server = Server::bind()?;
    let netlink = Netlink::new()?;
    netlink.sweep().await?;
    let mut programs = Programs::load(LoadOptions { max_tunnels: options.max_tunnels })?;
    let keys = programs.keys()?;
    let config = UmemConfig { frames: options.frames, ..UmemConfig::default() };
    let (umem, pool) = Umem::new(config)?;
    let (events_to_manager, mut events) = mpsc::channel(1024);
    let worker = worker::start(umem.clone(), pool, events_to_manager)?;
    let (next_hops, mut hops) = NextHops::start(&netlink)?;
    let mut links = netlink.watch_links()?;
    let mut manager = Manager {
        options,
        programs,
        keys,
        netlink,
        next_hops,
        umem,
        worker,
        carriers: Carriers::default(),
        tenants: HashMap::new(),
        connections: HashMap::new(),
    };
    let (say, mut said) = mpsc::channel(64);
    let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
    let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
    let mut connection_number = 0;
    let mut idle_since = Some(Instant::now());
    ready();
    loop {
        let timeout = manager.next_deadline(idle_since);
        tokio::select! {
            connection = server.accept() => match connection {
                Ok(connection) => {
                    connection_number += 1;
                    let (receiver, sender) = connection.split();
                    manager.connections.insert(connection_number, sender);
                    tokio::spawn(listen(connection_number, receiver, say.clone()));
                }
                Err(error) => tracing::warn!("control socket: {error}"),
            },
            Some(said) = said.recv() => manager.hear(said).await,
            Some((number, event)) = events.recv() => manager.pass_on(number, event),
            Some((number, hop)) = hops.recv() => manager.set_hop(number, hop).await,
            Some(event) = links.recv() => manager.link_changed(&event),
            _ = terminate.recv() => break,
            _ = interrupt.recv() => break,
            () = tokio::time::sleep_until(timeout.into()) => {}
        }
        manager.forget_previous_keys();
        idle_since = if manager.tenants.is_empty() { idle_since.or_else(|| Some(Instant::now())) } else { None };
        let patience = if manager.had_tunnels { Duration::ZERO } else { FIRST_TUNNEL };
        if !manager.options.stay && idle_since.is_some_and(|since| since.elapsed() >= patience) {
            break;
        }
    }
    manager.close().await;
    Ok(())
}
