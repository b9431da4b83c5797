use super::super::frames::{FrameSet, Pool};
use super::super::umem::Layout;
use super::super::{Error, Packet, Umem, UmemConfig};

const LAYOUT: Layout = Layout { umem: 7, frames: 100, frame_size: 2048, headroom: 0 };

fn config() -> UmemConfig {
    UmemConfig { frames: 4, frame_size: 2048, headroom: 0, huge_pages: false }
}

#[test]
fn a_set_gives_back_what_it_was_given_once() {
    let mut pool = Pool::full(LAYOUT);
    let mut set = FrameSet::new(LAYOUT);
    let frame = pool.take().unwrap();
    let index = frame.index();
    let address = set.put(frame);
    assert_eq!(address, u64::from(index) * 2048);
    let (frame, offset) = set.take(address + 300).unwrap();
    assert_eq!((frame.index(), offset), (index, 300));
    assert!(set.take(address).is_none());
    pool.put(frame);
    assert_eq!((set.len(), pool.free()), (0, pool.total()));
}

#[test]
fn a_set_knows_no_address_outside_the_umem() {
    let mut pool = Pool::full(LAYOUT);
    let mut set = FrameSet::new(LAYOUT);
    while let Some(frame) = pool.take() {
        set.put(frame);
    }
    for address in [100 * 2048, 127 * 2048, 1 << 40, u64::MAX] {
        assert!(set.take(address).is_none(), "{address:#x}");
    }
    set.take_all().for_each(|frame| pool.put(frame));
    assert_eq!((set.len(), pool.free()), (0, pool.total()));
}

#[test]
fn all_chunks_can_be_written_at_once_and_none_overlaps() {
    for huge_pages in [false, true] {
        let (umem, mut pool) = Umem::new(UmemConfig { huge_pages, ..config() }).unwrap();
        let mut frames: Vec<_> = std::iter::from_fn(|| pool.take()).collect();
        let chunks: Vec<&mut [u8]> = frames.iter_mut().map(|frame| umem.chunk_mut(frame)).collect();
        for (n, chunk) in chunks.into_iter().enumerate() {
            assert_eq!(chunk.len(), 2048);
            chunk.fill(n as u8);
        }
        for (n, frame) in frames.iter().enumerate() {
            assert!(umem.chunk(frame).iter().all(|octet| *octet == n as u8));
        }
    }
}

#[test]
#[should_panic(expected = "another UMEM")]
fn a_frame_opens_no_chunk_of_another_umem() {
    let (_, mut pool) = Umem::new(config()).unwrap();
    let (other, _) = Umem::new(config()).unwrap();
    other.chunk(&pool.take().unwrap());
}

#[test]
#[should_panic(expected = "another UMEM")]
fn a_pool_takes_no_frame_of_another_umem() {
    let (_, mut pool) = Umem::new(config()).unwrap();
    let (_, mut other) = Umem::new(config()).unwrap();
    other.put(pool.take().unwrap());
}

#[test]
#[should_panic(expected = "out of range")]
fn a_packet_does_not_reach_beyond_its_chunk() {
    let (umem, mut pool) = Umem::new(config()).unwrap();
    let packet = Packet { frame: pool.take().unwrap(), offset: 2000, len: 100, more: false };
    packet.data(&umem);
}

#[test]
fn sizes_that_the_kernel_refuses_are_refused_by_name() {
    let cases = [
        (UmemConfig { frame_size: 1024, ..config() }, "frame size is 1024"),
        (UmemConfig { frames: 0, ..config() }, "number of frames is 0"),
        (UmemConfig { headroom: 2000, ..config() }, "headroom is 2000"),
    ];
    for (config, expected) in cases {
        let error = Umem::new(config).err().expect("a refusal");
        assert!(matches!(error, Error::Size { .. }) && error.to_string().contains(expected), "{error}");
    }
}
