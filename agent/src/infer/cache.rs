//! Answers that were given before, for models whose configuration says that the same request has the same answer.
//!
//! What is asked is told by a hash over the loaded version, the tenant, and every byte of the inputs: a tenant cannot
//! find out by an answer's time what another one asked.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Mutex, MutexGuard, PoisonError};

use sha2::{Digest, Sha256};
use vaccel_proto::v1::Tensor;

use crate::identity::Tenant;
use crate::repository::Served;
use crate::scheduler::Call;

/// Bytes of all answers that are kept. Those that repeat are small: classes, vectors.
const BYTES_MAX: usize = 64 << 20;

/// What an answer takes beside its bytes, about.
const ENTRY_BYTES: usize = 512;

/// What is asked.
pub(super) type Key = [u8; 32];

/// The key of a call.
pub(super) fn key(tenant: &Tenant, served: &Served, call: &Call) -> Key {
    let mut hash = Sha256::new();
    // Every part has its length before it, so that no two calls run into each other.
    let mut part = |bytes: &[u8]| {
        hash.update((bytes.len() as u64).to_le_bytes());
        hash.update(bytes);
    };
    part(tenant.as_str().as_bytes());
    part(&served.id.to_le_bytes());
    for output in &call.outputs {
        part(&(*output as u64).to_le_bytes());
    }
    for input in &call.inputs {
        part(&input.dtype.to_le_bytes());
        let shape: Vec<u8> = input.shape.iter().flat_map(|dim| dim.to_le_bytes()).collect();
        part(&shape);
        part(&input.data);
    }
    hash.finalize().into()
}

#[derive(Debug, Default)]
struct Kept {
    answers: HashMap<Key, (u64, Vec<Tensor>)>,
    /// By when they were last given.
    order: BTreeMap<u64, Key>,
    bytes: usize,
    clock: u64,
}

/// The answers that were given last.
#[derive(Debug, Default)]
pub(super) struct Cache(Mutex<Kept>);

fn weight(answer: &[Tensor]) -> usize {
    ENTRY_BYTES + answer.iter().map(|tensor| tensor.data.len()).sum::<usize>()
}

impl Cache {
    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The answer, if it is there.
    pub(super) fn get(&self, key: &Key) -> Option<Vec<Tensor>> {
        let mut kept = self.kept();
        kept.clock += 1;
        let now = kept.clock;
        let (used, answer) = kept.answers.get_mut(key)?;
        let (before, answer) = (std::mem::replace(used, now), answer.clone());
        kept.order.remove(&before);
        kept.order.insert(now, *key);
        Some(answer)
    }

    /// Keeps an answer; those that were not asked for longest give way.
    pub(super) fn put(&self, key: Key, answer: &[Tensor]) {
        let bytes = weight(answer);
        if bytes > BYTES_MAX {
            return;
        }
        let mut kept = self.kept();
        kept.clock += 1;
        let now = kept.clock;
        // A copy: what is kept must not hold on to the whole of what it was a part of.
        let own = answer.iter().map(|tensor| {
            let data = bytes::Bytes::copy_from_slice(&tensor.data);
            Tensor { data, ..tensor.clone() }
        });
        if let Some((before, old)) = kept.answers.insert(key, (now, own.collect())) {
            kept.order.remove(&before);
            kept.bytes -= weight(&old);
        }
        kept.order.insert(now, key);
        kept.bytes += bytes;
        while kept.bytes > BYTES_MAX {
            let Some((_, oldest)) = kept.order.pop_first() else { return };
            if let Some((_, answer)) = kept.answers.remove(&oldest) {
                kept.bytes -= weight(&answer);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use vaccel_proto::v1::DType;

    fn answer(bytes: usize) -> Vec<Tensor> {
        vec![Tensor::from_bytes(DType::U8, &[], Bytes::from(vec![7; bytes]))]
    }

    #[test]
    fn what_was_not_asked_for_longest_gives_way() {
        let cache = Cache::default();
        let third = BYTES_MAX / 3 - ENTRY_BYTES;
        for key in [1, 2, 3] {
            cache.put([key; 32], &answer(third));
        }
        assert!(cache.get(&[1; 32]).is_some());
        cache.put([4; 32], &answer(third));
        let there = [1, 2, 3, 4].map(|key| cache.get(&[key; 32]).is_some());
        assert_eq!(there, [true, false, true, true]);
        cache.put([5; 32], &answer(BYTES_MAX));
        assert!(cache.get(&[5; 32]).is_none(), "larger than all that may be kept");
        cache.put([1; 32], &answer(1));
        assert_eq!(cache.get(&[1; 32]).expect("replaced")[0].data.len(), 1);
        assert!(cache.kept().bytes <= BYTES_MAX);
    }
}
