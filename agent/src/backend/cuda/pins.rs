//! Memory that the agent shares with callers, which devices reach by themselves: what lies there goes up, and what is
//! wanted there comes down, without passing through a stage.
//!
//! Pinning takes every page of it, and some 0.3 s for a GiB. So memory is offered when something lies there that a
//! device is to compute with, and pinned by the run that needs it first. It stays so until it is unmapped.

use std::collections::BTreeMap;
use std::ptr::NonNull;
use std::sync::{Arc, OnceLock, PoisonError, RwLock, Weak};

use super::driver::{Context, Registered};
use super::stream::Held;
use crate::shared::Mapping;

/// All that was offered, by address.
#[derive(Clone, Default)]
pub(super) struct Pins(Arc<RwLock<BTreeMap<usize, Arc<Offer>>>>);

struct Offer {
    mapping: Weak<Mapping>,
    /// None where the driver refused.
    registered: OnceLock<Option<Registered>>,
}

/// What a mapping keeps: with it goes the offer, and the pin, before the memory does.
struct Withdrawal {
    pins: Pins,
    address: usize,
}

impl Drop for Withdrawal {
    fn drop(&mut self) {
        let offer = self.pins.0.write().unwrap_or_else(PoisonError::into_inner).remove(&self.address);
        // Its last owner: whoever else had it held the mapping, too.
        drop(offer);
    }
}

impl Pins {
    /// Lets devices reach a mapping.
    pub(super) fn offer(&self, mapping: &Arc<Mapping>) {
        mapping.attach(|memory| {
            let address = memory.cast::<u8>().as_ptr().addr();
            let offer = Offer { mapping: Arc::downgrade(mapping), registered: OnceLock::new() };
            self.0.write().unwrap_or_else(PoisonError::into_inner).insert(address, Arc::new(offer));
            Box::new(Withdrawal { pins: self.clone(), address })
        });
    }

    /// A place, if it is in memory that was offered and can be pinned. Nobody needs to know whether it is.
    #[allow(unsafe_code, reason = "as the contract demands")]
    pub(super) fn held(&self, context: &Arc<Context>, place: NonNull<[u8]>) -> Option<Held> {
        let address = place.cast::<u8>().as_ptr().addr();
        // In this order, so that the mapping outlives the offer; and both the lock, which the last of them would take.
        let (mapping, offer) = {
            let offers = self.0.read().unwrap_or_else(PoisonError::into_inner);
            let offer = offers.range(..=address).next_back()?.1;
            (offer.mapping.upgrade()?, Arc::clone(offer))
        };
        let all = mapping.pointer(&(0..mapping.bytes()))?;
        let offset = address - all.cast::<u8>().as_ptr().addr();
        if offset.checked_add(place.len()).is_none_or(|end| end > all.len()) {
            return None;
        }
        let register = || {
            Registered::new(context, all)
                .inspect_err(
                    |failure| tracing::debug!(%failure, bytes = all.len(), "shared memory is not pinned"),
                )
                .ok()
        };
        offer.registered.get_or_init(register).as_ref()?;
        // SAFETY: the mapping is pinned, and the place is within it; the pin ends when the mapping does.
        Some(unsafe { Held::new(mapping, place) })
    }
}
