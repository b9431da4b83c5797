use super::*;

/// The behaviour of the path.
#[derive(Clone, Copy)]
struct Line {
    groups_arrive: bool,
    alone_arrive: bool,
}

const WORKS: Line = Line { groups_arrive: true, alone_arrive: true };
const LOSES_GROUPS: Line = Line { groups_arrive: false, alone_arrive: true };
const SILENT: Line = Line { groups_arrive: false, alone_arrive: false };

struct Bench {
    segmentation: Segmentation,
    now: Instant,
    asked: u32,
    changes: Vec<SegmentationChange>,
}

impl Bench {
    fn new() -> Self {
        let now = Instant::now();
        Self { segmentation: Segmentation::new(7, now), now, asked: 0, changes: Vec::new() }
    }

    /// Sends many groups for `time` over a path with a short round trip.
    fn run(&mut self, time: Duration, line: Line) {
        let end = self.now + time;
        while self.now < end {
            if self.segmentation.works() {
                self.segmentation.sent();
            }
            let (ask, change) = self.segmentation.poll(self.now);
            self.changes.extend(change);
            self.now += Duration::from_millis(10);
            self.asked += u32::from(ask.is_some());
            let answer = match ask {
                Some(Ask::Group(mark)) => line.groups_arrive.then_some(mark),
                Some(Ask::Alone(mark)) => line.alone_arrive.then_some(mark),
                None => None,
            };
            if let Some(mark) = answer {
                self.changes.extend(self.segmentation.answered(&mark, self.now).expect("one of its own"));
            }
        }
    }
}

#[test]
fn groups_that_arrive_go_on_and_are_asked_after_now_and_then() {
    let mut bench = Bench::new();
    bench.run(Duration::from_secs(600), WORKS);
    assert_eq!(bench.changes, []);
    assert!((57..=61).contains(&bench.asked), "{}", bench.asked);
}

#[test]
fn groups_that_are_lost_while_single_datagrams_pass_are_given_up_and_tried_again_later() {
    let mut bench = Bench::new();
    bench.run(Duration::from_secs(9), LOSES_GROUPS);
    assert_eq!(bench.changes, [SegmentationChange::Lost(MIN_RETRY_WAIT)]);
    assert!(!bench.segmentation.works());
    assert!(bench.segmentation.note().is_some_and(|note| note.contains("do not arrive")));
    // As long as groups are lost, no data is sent in groups, and the peer is asked less and less often.
    bench.asked = 0;
    bench.run(Duration::from_secs(3600), LOSES_GROUPS);
    assert!(!bench.segmentation.works() && bench.asked < 20, "{}", bench.asked);
    bench.run(MAX_RETRY_WAIT + ANSWER_TIMEOUT, WORKS);
    assert_eq!(bench.changes, [SegmentationChange::Lost(MIN_RETRY_WAIT), SegmentationChange::Works]);
    assert!(bench.segmentation.works() && bench.segmentation.note().is_none());
}

#[test]
fn a_peer_that_is_away_or_answers_no_ping_is_no_reason() {
    let mut bench = Bench::new();
    bench.run(Duration::from_secs(600), SILENT);
    assert_eq!((bench.changes.len(), bench.segmentation.works()), (0, true));
    bench.run(CHECK_INTERVAL, WORKS);
    assert_eq!((bench.changes.len(), bench.segmentation.works()), (0, true));
}

#[test]
fn groups_that_are_lost_now_and_then_are_no_reason() {
    let mut bench = Bench::new();
    for round in 0..100 {
        let line = Line { groups_arrive: round % 3 == 2, alone_arrive: true };
        bench.run(2 * ANSWER_TIMEOUT, line);
    }
    assert_eq!((bench.changes.len(), bench.segmentation.works()), (0, true));
}

#[test]
fn a_late_answer_counts() {
    let mut bench = Bench::new();
    bench.run(Duration::from_millis(400), SILENT);
    let mark = Mark::try_from([&7_u32.to_be_bytes()[..], &1_u32.to_be_bytes(), &[1]].concat()).unwrap();
    bench.run(Duration::from_secs(9), LOSES_GROUPS);
    assert!(!bench.segmentation.works());
    assert_eq!(bench.segmentation.answered(&mark, bench.now), Some(Some(SegmentationChange::Works)));
    assert!(bench.segmentation.works());
}

#[test]
fn where_little_leaves_nothing_is_asked() {
    let mut bench = Bench::new();
    for _ in 0..1000 {
        bench.now += ANSWER_TIMEOUT;
        assert_eq!(bench.segmentation.poll(bench.now), (None, None));
    }
}

#[test]
fn what_the_kernel_refuses_is_given_up_and_tried_again_ever_later() {
    let bench = Bench::new();
    let mut now = bench.now;
    for seconds in [10, 20, 40, 80, 160, 320, 640, 640] {
        let wait = Duration::from_secs(seconds);
        assert_eq!(bench.segmentation.refused(Errno::EIO, now), SegmentationChange::Refused(Errno::EIO, wait));
        assert!(!bench.segmentation.works());
        bench.segmentation.poll(now + wait - Duration::from_millis(1));
        assert!(!bench.segmentation.works());
        now += wait;
        bench.segmentation.poll(now);
        assert!(bench.segmentation.works());
    }
}

#[test]
fn answers_to_others_are_left_to_them() {
    let bench = Bench::new();
    for data in [&[][..], &[1; MARK], &[0, 0, 0, 7]] {
        assert_eq!(bench.segmentation.answered(data, bench.now), None);
    }
}

#[test]
fn another_way_to_the_peer_begins_anew() {
    let mut bench = Bench::new();
    bench.run(Duration::from_secs(9), LOSES_GROUPS);
    assert!(!bench.segmentation.works());
    bench.segmentation.start_over();
    assert!(bench.segmentation.works() && bench.segmentation.note().is_none());
    bench.changes.clear();
    bench.run(Duration::from_secs(9), LOSES_GROUPS);
    assert_eq!(bench.changes, [SegmentationChange::Lost(MIN_RETRY_WAIT)]);
}
