//! The segmenter: any pieces are refused, or are cut into packets that together have all of the payload.

use arbitrary::Arbitrary;
use cipe_user::inner::ip;
use cipe_user::inner::segment::Superframe;

use crate::read;

#[derive(Arbitrary, Debug)]
struct Case<'a> {
    gso_size: u16,
    /// Lengths of the pieces in octets, used in turn.
    pieces: [u8; 3],
    octets: &'a [u8],
}

/// Runs one input.
pub fn run(input: &[u8]) {
    let Some(case) = read::<Case<'_>>(input) else { return };
    let (mut pieces, mut rest, mut turn) = (Vec::new(), case.octets, 0);
    while !rest.is_empty() {
        let (piece, left) = rest.split_at(rest.len().min(1 + usize::from(case.pieces[turn % 3])));
        pieces.push(piece);
        (rest, turn) = (left, turn + 1);
    }
    let Ok(mut superframe) = Superframe::parse(&pieces, case.gso_size) else { return };
    let (segments, total, longest) = (superframe.segments(), superframe.headers().total(), superframe.longest());
    assert!(superframe.headers().total() <= case.octets.len());
    let mut buffer = vec![0; longest];
    let (mut cut, mut octets) = (0, 0);
    while let Some(len) = superframe.cut(&mut buffer) {
        assert!(len <= longest);
        assert!(ip::check(&buffer[..len]).is_ok(), "a segment is one IP packet");
        (cut, octets) = (cut + 1, octets + len);
    }
    assert!(cut == segments && octets >= total);
}
