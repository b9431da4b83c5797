//! A soak: traffic through a tunnel while everything happens to it, at random, and promises that hold all the time.
//!
//! Events follow each other in an order that the seed decides ([`plan`]). Each happens under pings both ways ([`clock`]);
//! when they are answered again, traffic ends, and at this quiet point the sums must match ([`account`]), processes must hold
//! no more than before ([`levels`]), and nothing may be left over. Every frame of the carrier is looked at ([`carrier`]).

mod account;
mod carrier;
mod clock;
mod events;
mod levels;
mod plan;
mod report;
mod world;

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use carrier::Frames;
use clock::{under_pings, wait_for_answers};
use levels::{Figure, Levels};
use plan::{Event, Plan, Rule};
use report::Invariant;
use world::{SIDES, Settled, World, index};

pub use plan::Kind;
pub use report::Report;

/// What to do.
#[derive(Clone, Debug)]
pub struct Settings {
    /// No event begins after this.
    pub duration: Duration,
    /// Decides all events.
    pub seed: u64,
    /// The build that takes turns with the one under test.
    pub other: Option<PathBuf>,
    /// Kinds of events; none means all.
    pub only: Vec<Kind>,
    /// Whether the tunnel is sealed.
    pub is_sealed: bool,
}

/// Pings after each event, so that traffic flows for a while.
const AFTER: Duration = Duration::from_millis(500);
/// After this number of violations nothing more is to be learnt.
const ENOUGH_FAULTS: usize = 20;

/// Runs a soak, prints a line for each event, and returns its report.
///
/// # Errors
/// The network or the gateways cannot be made at all.
pub fn run(settings: &Settings) -> Result<Report> {
    let mut soak = Soak { settings, start: Instant::now(), report: Report::default(), totals: Totals::default() };
    soak.all()?;
    Ok(soak.report)
}

/// Sums over the whole soak.
#[derive(Default)]
struct Totals {
    levels: Levels,
    frames: Frames,
    /// Sums that were compared, and packets in them.
    compared: (usize, u64),
    accepted: u64,
    no_frame: u64,
    looks: usize,
    worlds: usize,
}

struct Soak<'a> {
    settings: &'a Settings,
    start: Instant,
    report: Report,
    totals: Totals,
}

impl Soak<'_> {
    fn all(&mut self) -> Result<()> {
        let Settings { duration, seed, other, only, .. } = self.settings;
        let mut world = None;
        for event in Plan::new(*seed, only) {
            if self.start.elapsed() > *duration || self.report.faults() >= ENOUGH_FAULTS {
                break;
            }
            let mut running = match world.take() {
                Some(world) => world,
                None => self.begin(other.as_deref())?,
            };
            match self.happen(&mut running, &event) {
                Ok(()) => world = Some(running),
                Err(error) => {
                    // The next event has a network of its own.
                    let logs = running.logs();
                    self.fault(&event, Invariant::Recovery, &format!("{error:#}\n{logs}"));
                    self.end(running, false);
                }
            }
        }
        if let Some(world) = world {
            self.end(world, true);
        }
        self.conclude();
        Ok(())
    }

    fn begin(&mut self, other: Option<&std::path::Path>) -> Result<World> {
        self.totals.worlds += 1;
        let world =
            World::new(self.settings.seed, other, self.settings.is_sealed).context("the network of the soak")?;
        self.say("both gateways are up and have keys");
        Ok(world)
    }

    /// One event, and the quiet point after it.
    fn happen(&mut self, world: &mut World, event: &Event) -> Result<()> {
        let net = world.net.clone();
        let (happened, pings) = under_pings(&net, |clock| -> Result<()> {
            events::act(world, event, clock)?;
            wait_for_answers(&net)?;
            clock.wait(AFTER)
        })?;
        let (sent, lost) = pings.iter().fold((0, 0), |(sent, lost), ping| (sent + ping.sent, lost + ping.lost.len()));
        let gap = pings.iter().map(|ping| ping.longest_gap).max().unwrap_or_default();
        if let Err(error) = &happened {
            self.say(&format!("#{} {} {}: {error:#}", event.number, event.kind.name(), event.side.letter()));
        }
        happened?;
        world.daemons_live()?;
        self.report.event(event.kind, gap, (sent, lost));
        let settled = world.settle(event.kind.rule())?;
        let lossless = event.kind.is_lossless()
            && settled.iter().flatten().all(|settled| settled.account.lost() == 0 && settled.account.dropped == 0);
        world.record(lossless);
        let mut counted = Vec::new();
        for side in SIDES {
            let peer = settled[index(side.other())].as_ref().map(|settled| &settled.account);
            let Some(Settled { account, faults }) = &settled[index(side)] else {
                counted.push(format!("{}: counts anew", side.letter()));
                if event.kind.rule() != Rule::Anew {
                    let text = format!("{}: another engine, daemon or tunnel, for no reason", side.letter());
                    self.fault(event, Invariant::Recovery, &text);
                }
                continue;
            };
            self.totals.compared.0 += 1;
            self.totals.compared.1 += account.arrived + account.entered;
            counted.push(format!("{}: {}", side.letter(), account.text()));
            for fault in faults {
                self.fault(event, Invariant::Sums, &format!("{}: {fault}\n{account:?}", side.letter()));
            }
            self.totals.accepted += account.verdicts.get("delivered").copied().unwrap_or_default();
            let no_frame = account.verdicts.get("no-frame").copied().unwrap_or_default();
            self.totals.no_frame += no_frame;
            if no_frame > 0 && !event.kind.is_flood() {
                self.fault(event, Invariant::Frames, &format!("{}: {no_frame} packets\n{account:?}", side.letter()));
            }
            let forged = account.forged(peer);
            if forged > 0 {
                let text = format!("{}: {forged} datagrams too many\n{account:?}", side.letter());
                self.fault(event, Invariant::Forged, &text);
            }
        }
        let line = format!(
            "#{} {} {}: without an answer for at most {} ms, {lost} of {sent} pings lost; {}",
            event.number,
            event.kind.name(),
            event.side.letter(),
            gap.as_millis(),
            counted.join("; ")
        );
        self.say(&line);
        self.look(world, event)
    }

    /// What must hold at a quiet point beside the sums.
    fn look(&mut self, world: &mut World, event: &Event) -> Result<()> {
        self.totals.looks += 1;
        world.measure(&mut self.totals.levels);
        for side in SIDES {
            let left = world.left_over(side)?;
            if !left.is_empty() {
                self.fault(event, Invariant::Leftovers, &format!("{}: {}", side.letter(), left.join("; ")));
            }
        }
        let frames = world.watch.frames()?;
        if frames.foreign > 0 || frames.missed > 0 {
            let first = world.watch.first_foreign().unwrap_or_default();
            self.fault(event, Invariant::Carrier, &format!("{frames:?}; the first: {first}"));
            // Each is reported once.
            self.add(frames);
            world.watch = carrier::Watch::start(&world.net)?;
        }
        Ok(())
    }

    fn add(&mut self, frames: Frames) {
        let all = &mut self.totals.frames;
        all.sealed += frames.sealed;
        all.arp += frames.arp;
        all.errors += frames.errors;
        all.foreign += frames.foreign;
        all.missed += frames.missed;
    }

    /// Removes everything; `whole`: nothing has failed before that would leave something.
    fn end(&mut self, mut world: World, whole: bool) {
        match world.watch.frames() {
            Ok(frames) => {
                if frames.foreign > 0 || frames.missed > 0 {
                    self.say(&format!("FAILED, the carrier at the end: {frames:?}"));
                    self.report.fault(Invariant::Carrier);
                }
                self.add(frames);
            }
            Err(error) => {
                self.say(&format!("FAILED, the carrier was not seen: {error:#}"));
                self.report.fault(Invariant::Carrier);
            }
        }
        match world.end() {
            Ok(left) if left.is_empty() => self.say("everything is removed"),
            Ok(left) => {
                self.say(&format!("left over: {}", left.join("; ")));
                if whole {
                    self.report.fault(Invariant::Leftovers);
                }
            }
            Err(error) => {
                self.say(&format!("the end: {error:#}"));
                if whole {
                    self.report.fault(Invariant::Leftovers);
                }
            }
        }
    }

    fn conclude(&mut self) {
        let Totals { levels, frames, compared, accepted, no_frame, looks, worlds } = &self.totals;
        let Frames { sealed, arp, errors, foreign, missed } = frames;
        let recovered = self.report.events();
        let mut figures = vec![
            (
                Invariant::Carrier,
                format!("{sealed} sealed frames, {arp} ARP, {errors} ICMP errors, {foreign} others, {missed} not seen"),
            ),
            (Invariant::Sums, format!("compared {} times over {} packets", compared.0, compared.1)),
            (Invariant::Forged, format!("{accepted} packets accepted")),
            (Invariant::Recovery, format!("after {recovered} events; the network was made {worlds} times")),
        ];
        for (invariant, figure) in [
            (Invariant::Memory, Figure::Memory),
            (Invariant::Descriptors, Figure::Descriptors),
            (Invariant::Entries, Figure::Entries),
        ] {
            let (text, level) = levels.judge(figure);
            match level {
                None => self.report.unjudged(invariant),
                Some(true) => {}
                Some(false) => self.report.fault(invariant),
            }
            figures.push((invariant, text));
        }
        figures.push((Invariant::Frames, format!("{no_frame} packets found no free frame")));
        figures.push((Invariant::Leftovers, format!("looked {looks} times, and at the end")));
        for (invariant, text) in figures {
            self.report.figure(invariant, text);
        }
    }

    fn fault(&mut self, event: &Event, invariant: Invariant, text: &str) {
        self.report.fault(invariant);
        let seed = self.settings.seed;
        self.say(&format!("FAILED, {invariant:?}, seed {seed}, event {}: {text}\n{event:?}", event.number));
    }

    fn say(&self, text: &str) {
        println!("[{:>7.1} s] {text}", self.start.elapsed().as_secs_f64());
    }
}
