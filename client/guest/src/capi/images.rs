//! What is in images, for C. The contract is that of the module above.

#![allow(unsafe_code, reason = "the boundary to C")]

use core::ffi::c_int;

use super::types::{Bytes, CDetection, CLabel, CResource, CTimings, array, array_mut, resource, terminate};
use super::{Handle, NO_ARRAY, NO_GUEST};
use crate::types::{Detection, ITEMS_MAX, Label};

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_classify(
    guest: *mut Handle,
    model: *const CResource,
    images: *const Bytes,
    image_count: usize,
    labels: *mut CLabel,
    label_count: usize,
    labels_found: *mut usize,
    timings: *mut CTimings,
) -> c_int {
    /// Labels of all images of one call, each of which is held once more on the stack.
    const LABELS_MAX: usize = 5 * ITEMS_MAX;
    let guest = guest!(guest);
    // SAFETY: null, or a place for a number.
    let mut labels_found = unsafe { labels_found.as_mut() };
    if let Some(place) = &mut labels_found {
        **place = 0;
    }
    // SAFETY: the module's contract.
    let (model, Some(given), Some(places)) =
        (unsafe { (resource(model), array(images, image_count), array_mut(labels, label_count)) })
    else {
        return guest.refuses(NO_ARRAY);
    };
    let mut images: [&[u8]; ITEMS_MAX] = [&[]; ITEMS_MAX];
    let Some(images) = images.get_mut(..given.len()) else { return guest.refuses("expected 1 to 16 images") };
    for (image, given) in images.iter_mut().zip(given) {
        // SAFETY: the module's contract.
        let Some(given) = (unsafe { array(given.data, given.length) }) else {
            return guest.refuses(NO_ARRAY);
        };
        *image = given;
    }
    let mut labels = [Label::default(); LABELS_MAX];
    // More labels than there are places here for are not asked for.
    let whole = places.len().min(LABELS_MAX) / given.len().max(1) * given.len();
    let labels = labels.get_mut(..whole).unwrap_or_default();
    let outcome = guest.guest.classify(model.as_ref(), images, labels);
    let found = outcome.map_or(0, |(found, _)| found);
    for (place, label) in places.iter_mut().zip(labels.iter().take(found)) {
        (place.image, place.index, place.probability) = (label.image, label.index, label.probability);
        terminate(&label.name, &mut place.name);
    }
    if let Some(place) = labels_found {
        *place = found;
    }
    // SAFETY: the module's contract.
    unsafe { guest.returns_timed(outcome.map(|(_, timings)| timings), timings) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn vaccel_guest_detect(
    guest: *mut Handle,
    model: *const CResource,
    image: *const Bytes,
    threshold: f32,
    detections: *mut CDetection,
    detection_count: usize,
    detections_found: *mut usize,
    timings: *mut CTimings,
) -> c_int {
    /// Things of one call, each of which is held once more on the stack.
    const DETECTIONS_MAX: usize = 4 * ITEMS_MAX;
    let guest = guest!(guest);
    // SAFETY: null, or a place for a number.
    let mut detections_found = unsafe { detections_found.as_mut() };
    if let Some(place) = &mut detections_found {
        **place = 0;
    }
    // SAFETY: the module's contract.
    let (model, Some([given]), Some(places)) =
        (unsafe { (resource(model), array(image, 1), array_mut(detections, detection_count)) })
    else {
        return guest.refuses(NO_ARRAY);
    };
    // SAFETY: the module's contract.
    let Some(image) = (unsafe { array(given.data, given.length) }) else { return guest.refuses(NO_ARRAY) };
    let mut found = [Detection::default(); DETECTIONS_MAX];
    let found = found.get_mut(..places.len().min(DETECTIONS_MAX)).unwrap_or_default();
    let outcome = guest.guest.detect(model.as_ref(), image, threshold, found);
    let count = outcome.map_or(0, |(count, _)| count);
    for (place, Detection { label, left, top, right, bottom }) in
        places.iter_mut().zip(found.iter().take(count))
    {
        (place.label.image, place.label.index, place.label.probability) = (0, label.index, label.probability);
        terminate(&label.name, &mut place.label.name);
        (place.left, place.top, place.right, place.bottom) = (*left, *top, *right, *bottom);
    }
    if let Some(place) = detections_found {
        *place = count;
    }
    // SAFETY: the module's contract.
    unsafe { guest.returns_timed(outcome.map(|(_, timings)| timings), timings) }
}
