//! Image files: PNG or JPEG, decoded within bounds, as they are looked at.

use std::io::Cursor;

use bytes::Bytes;
use image::{DynamicImage, ImageDecoder, ImageReader, Limits};
use vaccel_proto::Error;
use vaccel_proto::limits::{CALL_PIXELS_MAX, IMAGE_PIXELS_MAX};

/// Memory one decoder may take, in bytes: the largest image at 16 bits for each of four channels.
const DECODER_BYTES_MAX: u64 = IMAGE_PIXELS_MAX * 8;

/// Checks the sizes that the headers of all files claim, before any is decoded.
pub(in crate::ops) fn check_pixels(files: &[Bytes]) -> Result<(), Error> {
    let mut total = 0_u64;
    for (index, file) in files.iter().enumerate() {
        total += pixels(&format!("images[{index}]"), file)?;
    }
    if total > CALL_PIXELS_MAX {
        return Err(Error::field("images", format!("at most {CALL_PIXELS_MAX} pixels in all"), total));
    }
    Ok(())
}

/// The pixels that a file's header claims.
///
/// # Errors
/// `BAD_ARGUMENT` for what is no image, and for too many pixels.
pub(super) fn pixels(path: &str, file: &Bytes) -> Result<u64, Error> {
    let (width, height) = decoder(path, file)?.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels > IMAGE_PIXELS_MAX {
        let expected = format!("at most {IMAGE_PIXELS_MAX} pixels");
        return Err(Error::field(path, expected, format!("{width} x {height}")));
    }
    Ok(pixels)
}

fn decoder<'a>(path: &str, file: &'a Bytes) -> Result<impl ImageDecoder + 'a, Error> {
    let reader = ImageReader::new(Cursor::new(file.as_ref())).with_guessed_format();
    let mut reader = reader.map_err(|error| undecodable(path, file, &error))?;
    let mut limits = Limits::default();
    limits.max_alloc = Some(DECODER_BYTES_MAX);
    reader.limits(limits);
    reader.into_decoder().map_err(|error| undecodable(path, file, &error))
}

/// Decodes a file, turned as its camera was held.
///
/// # Errors
/// `BAD_ARGUMENT` at `path` for what cannot be decoded.
pub(super) fn decode(path: &str, file: &Bytes) -> Result<DynamicImage, Error> {
    let mut decoder = decoder(path, file)?;
    let orientation = decoder.orientation().map_err(|error| undecodable(path, file, &error))?;
    if !is_whole(file) {
        return Err(undecodable(path, file, &"the end is missing"));
    }
    let mut image = DynamicImage::from_decoder(decoder).map_err(|error| undecodable(path, file, &error))?;
    image.apply_orientation(orientation);
    Ok(image)
}

/// Whether a JPEG file has its end: the decoder makes up what is missing of one, unlike of a PNG.
///
/// *Source:* ITU-T T.81, B.1.1: segments begin with a marker and their length, up to the first scan; inside scans the
/// byte 0xFF is followed by others than those of the end marker.
fn is_whole(file: &[u8]) -> bool {
    const SCAN: u8 = 0xda;
    const END: [u8; 2] = [0xff, 0xd9];
    let Some(mut rest) = file.strip_prefix(&[0xff, 0xd8]) else { return true };
    while let [0xff, marker, high, low, ..] = *rest {
        if marker == SCAN {
            return rest.windows(END.len()).any(|bytes| bytes == END);
        }
        // A marker may be preceded by any number of fill bytes.
        let length = if marker == 0xff { 1 } else { 2 + usize::from(u16::from_be_bytes([high, low])) };
        rest = rest.get(length..).unwrap_or_default();
    }
    // Not as the standard has it, and decoded all the same.
    true
}

fn undecodable(path: &str, file: &Bytes, error: &dyn std::fmt::Display) -> Error {
    Error::field(
        path,
        "a whole PNG or JPEG file",
        format!("{} bytes that cannot be decoded: {error}", file.len()),
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{GrayImage, ImageFormat};
    use vaccel_proto::Reason;

    fn png(image: &DynamicImage) -> Bytes {
        let mut out = Cursor::new(Vec::new());
        image.write_to(&mut out, ImageFormat::Png).expect("encodes");
        out.into_inner().into()
    }

    #[test]
    fn broken_and_huge_files_are_refused_before_they_cost() {
        let whole = png(&GrayImage::new(40, 40).into());
        let mut huge = whole.to_vec();
        // Width and height of the header, then its checksum over type and data.
        huge[16..24].copy_from_slice(&[0, 0, 0xc3, 0x50, 0, 0, 0xc3, 0x50]);
        let checksum = crc32(&huge[12..29]);
        huge[29..33].copy_from_slice(&checksum.to_be_bytes());
        let refusal = check_pixels(&[whole.clone(), huge.into()]).expect_err("2.5 Gpx");
        assert!(
            refusal.message().starts_with("images[1]") && refusal.message().contains("50000 x 50000"),
            "{refusal}"
        );
        let mut jpeg = Cursor::new(Vec::new());
        GrayImage::new(40, 40).write_to(&mut jpeg, ImageFormat::Jpeg).expect("encodes");
        let jpeg = Bytes::from(jpeg.into_inner());
        decode("images[0]", &jpeg).expect("whole");
        let cut =
            [whole.slice(..whole.len() - 20), jpeg.slice(..jpeg.len() - 2), jpeg.slice(..jpeg.len() / 2)];
        for broken in cut.into_iter().chain([Bytes::new(), Bytes::from_static(b"GIF89a")]) {
            let refusal = decode("images[0]", &broken).expect_err("broken");
            assert_eq!(refusal.reason(), Reason::BadArgument);
        }
    }

    fn crc32(bytes: &[u8]) -> u32 {
        !bytes.iter().fold(!0_u32, |crc, byte| {
            (0..8)
                .fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
        })
    }
}
