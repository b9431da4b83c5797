use std::collections::VecDeque;

use proptest::prelude::*;

use super::super::ring::{Consumer, Producer};
use super::heap::Heap;

#[derive(Clone, Copy, Debug)]
enum Step {
    Push,
    Submit,
    Consume(u32),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![4 => Just(Step::Push), 1 => Just(Step::Submit), 1 => (0..40_u32).prop_map(Step::Consume)]
}

/// Start indices; some of them wrap soon.
fn start() -> impl Strategy<Value = u32> {
    prop_oneof![Just(0), any::<u32>(), (0..64_u32).prop_map(|n| u32::MAX - n)]
}

proptest! {
    #[test]
    fn a_ring_is_a_bounded_queue_wherever_its_indices_stand(
        log in 0..6_u32,
        start in start(),
        steps in prop::collection::vec(step(), 0..400),
    ) {
        let slots = 1 << log;
        let heap = Heap::<u64>::new(slots, start);
        let (mut producer, mut consumer) = (Producer::new(heap.clone()), Consumer::new(heap));
        let (mut staged, mut visible) = (VecDeque::new(), VecDeque::new());
        for (n, step) in steps.into_iter().enumerate() {
            let used = (staged.len() + visible.len()) as u32;
            match step {
                Step::Push => {
                    let fits = used < slots;
                    prop_assert_eq!(producer.push(n as u64), fits);
                    if fits {
                        staged.push_back(n as u64);
                    }
                }
                Step::Submit => {
                    producer.submit();
                    visible.append(&mut staged);
                }
                Step::Consume(want) => {
                    let count = consumer.available().min(want);
                    let read: Vec<u64> = (0..count).map(|n| consumer.peek(n)).collect();
                    consumer.release(count);
                    let expected: Vec<u64> = visible.drain(..visible.len().min(want as usize)).collect();
                    prop_assert_eq!(read, expected);
                }
            }
            let used = (staged.len() + visible.len()) as u32;
            prop_assert_eq!(consumer.available() as usize, visible.len());
            prop_assert_eq!(producer.free(slots), slots - used);
            prop_assert_eq!(producer.pending(), used);
        }
        let left: Vec<u64> = producer.unconsumed().collect();
        let expected: Vec<u64> = visible.into_iter().chain(staged).collect();
        prop_assert_eq!(left, expected);
    }

    #[test]
    fn nonsensical_indices_of_the_other_side_stop_a_ring_and_nothing_else(
        start in start(),
        nonsense in any::<u32>(),
    ) {
        let (ours, theirs) = (Heap::<u64>::new(8, start), Heap::<u64>::new(8, start));
        let (mut producer, consumer) = (Producer::new(ours.clone()), Consumer::new(theirs.clone()));
        ours.set_consumer(nonsense);
        theirs.set_producer(nonsense);
        prop_assert!(producer.free(9) <= 8 && producer.pending() <= 8);
        prop_assert!(consumer.available() <= 8);
    }
}

#[test]
fn what_is_not_submitted_is_not_seen() {
    let heap = Heap::<u64>::new(4, u32::MAX);
    let (mut producer, consumer) = (Producer::new(heap.clone()), Consumer::new(heap));
    assert!(producer.push(1) && producer.push(2));
    assert_eq!(consumer.available(), 0);
    producer.submit();
    assert_eq!((consumer.available(), consumer.peek(0), consumer.peek(1)), (2, 1, 2));
}

#[test]
fn a_producer_sees_when_its_consumer_sleeps() {
    let heap = Heap::<u64>::new(4, 0);
    let producer = Producer::new(heap.clone());
    assert!(!producer.needs_wakeup());
    heap.set_flags(1);
    assert!(producer.needs_wakeup());
    heap.set_flags(2);
    assert!(!producer.needs_wakeup(), "other flags mean something else");
}

#[test]
fn two_threads_pass_everything_in_order() {
    let last: u64 = if cfg!(miri) { 200 } else { 200_000 };
    let heap = Heap::<[u64; 2]>::new(8, u32::MAX - 100);
    let (mut producer, mut consumer) = (Producer::new(heap.clone()), Consumer::new(heap));
    let sender = std::thread::spawn(move || {
        for n in 0..last {
            while !producer.push([n, !n]) {
                producer.submit();
                std::thread::yield_now();
            }
            if n % 3 == 0 {
                producer.submit();
            }
        }
        producer.submit();
    });
    let mut next = 0;
    while next < last {
        let available = consumer.available();
        for n in 0..available {
            assert_eq!(consumer.peek(n), [next, !next]);
            next += 1;
        }
        consumer.release(available);
        if available == 0 {
            std::thread::yield_now();
        }
    }
    sender.join().unwrap();
}
