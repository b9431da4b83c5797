//! The guard of a tunnel: `unreachable` routes beside the routes into its interface, so that private packets stay here when the
//! interface, the engine and the daemon are gone.
//!
//! The daemon follows the routes into its interface, those of ip-up, of the operator and of routing daemons, and gives each a
//! guard route. It takes one back only if somebody removes the route itself, and not if the route goes with the interface.

mod record;

use std::collections::BTreeSet;

use anyhow::Context;

use super::options::GuardPolicy;
use super::setup::Setup;
use crate::control::run_dir::RunDir;
use crate::kernel::guard_routes::{DeviceRoutes, RouteChange};
use crate::kernel::links;
use crate::kernel::netlink::Netlink;
pub use record::RecordFile;

use record::Record;

/// The guard routes of one tunnel.
pub(super) struct Guard {
    netlink: Netlink,
    run_dir: RunDir,
    file: RecordFile,
    policy: GuardPolicy,
    /// `None`: none are added.
    routes: Option<DeviceRoutes>,
}

impl Guard {
    /// Follows the routes into the interface; takes over the guard routes that an earlier daemon of this tunnel has left.
    ///
    /// # Errors
    /// No netlink socket can be opened, or /proc cannot be read.
    pub(super) fn start(setup: &Setup, device: &str) -> anyhow::Result<Self> {
        let policy = setup.options.guard;
        let record = Record::new(setup.identity(), device.to_owned(), policy == GuardPolicy::Always)?;
        let file = RecordFile::claim(&setup.run_dir, record).context("guard record")?;
        let (netlink, run_dir) = (Netlink::new()?, setup.run_dir.clone());
        let mut guard = Self { netlink, run_dir, file, policy, routes: None };
        guard.follow(device)?;
        Ok(guard)
    }

    /// The interface has another name.
    pub(super) fn rename(&mut self, device: &str) {
        device.clone_into(&mut self.file.record.device);
        if !self.file.record.guarded.is_empty() {
            self.write();
        }
    }

    /// Follows the routes into this interface from now on.
    ///
    /// # Errors
    /// No netlink socket can be opened.
    pub(super) fn follow(&mut self, device: &str) -> anyhow::Result<()> {
        if self.policy != GuardPolicy::No {
            self.routes = Some(DeviceRoutes::follow(&self.netlink, links::index_of(device))?);
        }
        self.rename(device);
        Ok(())
    }

    /// Waits until routes into the interface have come or gone. Cancel safe.
    pub(super) async fn changed(&mut self) {
        let Some(routes) = &mut self.routes else { return std::future::pending().await };
        if routes.changed().await.is_none() {
            tracing::error!("netlink notifications ended: new routes get no guard routes");
            self.routes = None;
        }
    }

    /// Gives the routes of now their guard routes, and takes back those of routes that somebody has removed.
    pub(super) async fn settle(&mut self) {
        let Some(routes) = &mut self.routes else { return self.clear().await };
        let changes = match routes.take().await {
            Ok(changes) => changes,
            Err(error) => {
                return tracing::warn!("{}: {error}; no guard routes for new routes", self.file.record.device);
            }
        };
        let (mut led, mut withdrawn) = (BTreeSet::new(), BTreeSet::new());
        for change in changes {
            let (destination, to, from) = match change {
                RouteChange::Led(destination) => (destination, &mut led, &mut withdrawn),
                RouteChange::Withdrawn(destination) => (destination, &mut withdrawn, &mut led),
            };
            from.remove(&destination);
            to.insert(destination);
        }
        // What the kernel has stands in the record: before it is added, and until it is removed.
        if !led.is_subset(&self.file.record.guarded) {
            self.file.record.guarded.extend(&led);
            self.write();
        }
        // Also those of an earlier daemon, which somebody may have removed meanwhile.
        for destination in &led {
            let added = self.netlink.add_guard_route(destination).await;
            self.log(added);
        }
        if !withdrawn.is_disjoint(&self.file.record.guarded) {
            let shared = self.file.shared(&self.run_dir);
            for destination in withdrawn.iter().filter(|gone| self.file.record.guarded.contains(gone)) {
                if shared.contains(destination) {
                    continue;
                }
                let removed = self.netlink.remove_guard_route(destination).await;
                self.log(removed);
            }
            self.file.record.guarded.retain(|guarded| !withdrawn.contains(guarded));
            self.write();
        }
    }

    /// The end of the daemon. After a stop that was asked for, the guard routes go, unless they are to stay.
    pub(super) async fn end(mut self, is_asked: bool) {
        if is_asked && self.policy != GuardPolicy::Always {
            let removed = self.file.open(&self.netlink, &self.run_dir).await;
            return self.log(removed);
        }
        let (device, count) = (&self.file.record.device, self.file.record.guarded.len());
        if count > 0 {
            tracing::info!("{device}: {count} guard routes stay; `cipe unguard {device}` removes them");
        }
    }

    /// Removes what an earlier daemon has left that had another policy.
    async fn clear(&mut self) {
        if self.policy == GuardPolicy::No && !self.file.record.guarded.is_empty() {
            let removed = self.file.open(&self.netlink, &self.run_dir).await;
            self.log(removed);
        }
    }

    fn write(&self) {
        if let Err(error) = self.file.write(&self.run_dir) {
            let device = &self.file.record.device;
            tracing::warn!("{device}: the record of its guard routes cannot be written: {error}");
        }
    }

    fn log<E: std::fmt::Display>(&self, result: Result<(), E>) {
        if let Err(error) = result {
            tracing::error!("{}: {error}", self.file.record.device);
        }
    }
}

impl RecordFile {
    /// Removes the guard routes of this record, and the record.
    ///
    /// # Errors
    /// The kernel refuses to remove one; the record stays then.
    pub async fn open(&mut self, netlink: &Netlink, run_dir: &RunDir) -> anyhow::Result<()> {
        let shared = self.shared(run_dir);
        for destination in self.record.guarded.difference(&shared) {
            netlink.remove_guard_route(destination).await?;
        }
        self.record.guarded.clear();
        self.remove(run_dir);
        Ok(())
    }
}
