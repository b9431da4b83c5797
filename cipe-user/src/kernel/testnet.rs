//! Network namespaces for tests: each ends with its thread, so nothing can be left behind.

use std::fs::File;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsRawFd;
use std::pin::Pin;

use netlink_packet_route::link::LinkAttribute;
use rtnetlink::{LinkUnspec, LinkVeth, RouteMessageBuilder};
use tokio::runtime::Handle;
use tokio::sync::{oneshot, watch};

use super::netlink::Netlink;

/// Maximum wait for an event of a test; the test fails after it.
pub(super) const DEADLINE: std::time::Duration = std::time::Duration::from_secs(20);

/// Runs a test in a new network namespace, or prints why it is skipped.
pub(crate) fn in_namespace<F: Future<Output = ()>>(test: impl FnOnce(Netlink) -> F + Send + 'static) {
    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: making network namespaces wants root");
        return;
    }
    let thread = std::thread::spawn(|| {
        unshare();
        runtime().block_on(async {
            let netlink = Netlink::new().unwrap();
            netlink.set_up("lo", true).await;
            test(netlink).await;
        });
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

fn unshare() {
    // SAFETY: only the network namespace is unshared, no file table, and only of this thread.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.unwrap();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

/// Another host: a second namespace with its own thread.
pub(super) struct Other {
    handle: Handle,
    namespace: File,
    _stop: oneshot::Sender<()>,
}

impl Other {
    pub(super) fn new() -> Self {
        let (sender, receiver) = std::sync::mpsc::channel();
        let (stop, stopped) = oneshot::channel::<()>();
        std::thread::spawn(move || {
            unshare();
            let runtime = runtime();
            let namespace = File::open("/proc/thread-self/ns/net").unwrap();
            sender.send((runtime.handle().clone(), namespace)).unwrap();
            // Ends when the other half is dropped.
            runtime.block_on(stopped).ok();
        });
        let (handle, namespace) = receiver.recv().unwrap();
        Self { handle, namespace, _stop: stop }
    }

    /// Runs a job on that host.
    pub(super) async fn run<T, F>(&self, job: impl FnOnce(Netlink) -> F + Send + 'static) -> T
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let task: Pin<Box<dyn Future<Output = T> + Send>> = Box::pin(async { job(Netlink::new().unwrap()).await });
        self.handle.spawn(task).await.unwrap()
    }
}

/// Commands of an operator.
impl Netlink {
    /// A cable to another host: `name` here, `peer` there, both up, each with an address in a /24 network.
    pub(super) async fn cable(&self, name: &str, address: [u8; 4], other: &Other, peer: &'static str, there: [u8; 4]) {
        let link = self.handle.link();
        link.add(LinkVeth::new(name, peer).build()).execute().await.unwrap();
        self.move_to(peer, other).await;
        other
            .run(move |netlink| async move {
                netlink.add_address(peer, there.into(), 24).await;
                netlink.set_up(peer, true).await;
            })
            .await;
        self.add_address(name, address.into(), 24).await;
        self.set_up(name, true).await;
    }

    pub(super) async fn move_to(&self, name: &str, other: &Other) {
        let moved = LinkUnspec::new_with_name(name).setns_by_fd(other.namespace.as_raw_fd()).build();
        self.handle.link().set(moved).execute().await.unwrap();
    }

    pub(super) async fn set_up(&self, name: &str, up: bool) {
        let link = LinkUnspec::new_with_name(name);
        let link = if up { link.up() } else { link.down() };
        self.handle.link().set(link.build()).execute().await.unwrap();
    }

    /// A device without ARP sends no requests and no answers, and forgets its neighbours.
    pub(super) async fn set_arp(&self, name: &str, on: bool) {
        let link = LinkUnspec::new_with_index(self.index(name).await).arp(on).build();
        self.handle.link().set(link).execute().await.unwrap();
    }

    pub(crate) async fn set_attribute(&self, name: &str, attribute: LinkAttribute) {
        let link = LinkUnspec::new_with_index(self.index(name).await).append_extra_attribute(attribute);
        self.handle.link().set(link.build()).execute().await.unwrap();
    }

    pub(super) async fn delete_named(&self, name: &str) {
        self.handle.link().del(self.index(name).await).execute().await.unwrap();
    }

    pub(super) async fn index(&self, name: &str) -> u32 {
        self.card_named(name).await.unwrap().ifindex
    }

    pub(super) async fn add_address(&self, name: &str, address: IpAddr, bits: u8) {
        let index = self.index(name).await;
        self.handle.address().add(index, address, bits).execute().await.unwrap();
    }

    /// Adds or replaces a route.
    pub(super) async fn add_route(&self, to: [u8; 4], bits: u8, gateway: [u8; 4]) {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to.into(), bits).gateway(gateway.into());
        self.handle.route().add(route.build()).replace().execute().await.unwrap();
    }

    pub(super) async fn add_device_route(&self, to: [u8; 4], bits: u8, index: u32) {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to.into(), bits).output_interface(index);
        self.handle.route().add(route.build()).execute().await.unwrap();
    }

    pub(super) async fn delete_route(&self, to: [u8; 4], bits: u8) {
        let route = RouteMessageBuilder::<Ipv4Addr>::new().destination_prefix(to.into(), bits);
        self.handle.route().del(route.build()).execute().await.unwrap();
    }

    /// Names of all devices, in the order of their creation.
    pub(super) async fn names(&self) -> Vec<String> {
        let links = self.links().await.unwrap();
        links.iter().filter_map(super::links::Card::from_message).map(|card| card.name).collect()
    }
}

/// Waits until the watched value satisfies a condition.
pub(super) async fn until<T: Clone + std::fmt::Debug>(
    receiver: &mut watch::Receiver<T>,
    condition: impl FnMut(&T) -> bool,
) -> T {
    let waited = tokio::time::timeout(DEADLINE, receiver.wait_for(condition)).await;
    let value = waited.ok().map(|value| value.unwrap().clone());
    value.unwrap_or_else(|| panic!("still {:?}", *receiver.borrow()))
}
