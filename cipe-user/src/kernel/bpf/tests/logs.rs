//! The path of a log record from the programs to a logger.

use std::time::Duration;

use tokio::{sync::mpsc, time::timeout};

use super::{frames::udp, *};

/// A logger that sends its records to the test.
struct Channel(mpsc::UnboundedSender<String>);

impl log::Log for Channel {
    fn enabled(&self, _: &log::Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &log::Record<'_>) {
        self.0.send(record.args().to_string()).unwrap();
    }

    fn flush(&self) {}
}

#[test]
fn a_rare_event_reaches_the_logger() {
    let Some(mut programs) = programs_with(LoadOptions { debug: true, ..LoadOptions::default() }) else { return };
    programs.set_tunnel(TUNNEL, Tunnel { flags: Tunnel::ALIVE, ..Tunnel::default() }).unwrap();
    let local = "192.0.2.1:4000".parse().unwrap();
    programs.add_carrier_address(local, TUNNEL).unwrap();
    let (sender, mut records) = mpsc::unbounded_channel();
    let logs = programs.logs_to(Channel(sender)).unwrap();
    assert!(programs.logs().is_none());
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        tokio::spawn(logs);
        for _ in 0..10 {
            programs.run_xdp(names::CARRIER_XDP, &udp(local, &[0x80; 16]));
        }
        let record = timeout(Duration::from_secs(10), records.recv()).await.unwrap().unwrap();
        assert_eq!(record, "tunnel 2: dynamic key flag without a receive key, handed on so that a key is asked for");
    });
}
