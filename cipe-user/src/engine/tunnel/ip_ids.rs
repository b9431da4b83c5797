//! Ids of outer IPv4 headers. With the addresses, they tell a receiver which fragments belong together (RFC 6864).

/// The ids of one tunnel in one worker, in turn. No other worker uses them.
#[derive(Clone, Copy, Debug)]
pub struct IpIds {
    first: u16,
    /// Number of ids, at least 1.
    count: u32,
    next: u32,
}

impl IpIds {
    /// The share of worker number `number` of `workers`.
    pub fn of_worker(number: usize, workers: usize) -> Self {
        let count = ((1 << 16) / workers.max(1)).max(1);
        Self { first: (number * count) as u16, count: count as u32, next: 0 }
    }

    /// Returns the first of `many` consecutive ids.
    pub fn take(&mut self, many: usize) -> u16 {
        let many = many as u32;
        if self.next + many > self.count {
            self.next = 0;
        }
        let first = self.first.wrapping_add(self.next as u16);
        self.next += many;
        first
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    #[test]
    fn no_two_workers_give_the_same_however_many_they_give() {
        const WORKERS: usize = 3;
        let mut owners = HashMap::new();
        for worker in 0..WORKERS {
            let mut ids = IpIds::of_worker(worker, WORKERS);
            for group in (1..64).cycle().take(20_000) {
                let first = ids.take(group);
                for id in (0..group).map(|n| first.wrapping_add(n as u16)) {
                    assert_eq!(*owners.entry(id).or_insert(worker), worker, "{id}");
                }
            }
        }
        assert!(owners.len() > 65_000);
    }

    #[test]
    fn one_comes_again_as_late_as_it_can() {
        let mut ids = IpIds::of_worker(0, 1);
        let given: Vec<u16> = (0..1 << 16).map(|_| ids.take(1)).collect();
        assert_eq!(given, (0..=u16::MAX).collect::<Vec<_>>());
        assert_eq!(ids.take(1), 0);
    }
}
