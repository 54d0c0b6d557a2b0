//! Who has how much of a device's memory: each tenant within its limit, all of them within the device's.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vaccel_proto::error::Detail;
use vaccel_proto::{Error, Reason};

use crate::quota::{Account, Hold, Unit};

/// The memory of one device, as far as the agent lets it be used.
#[derive(Debug)]
pub(crate) struct Ledger {
    device: String,
    limit: u64,
    used: AtomicU64,
}

/// Memory that is counted; dropping it gives back.
#[derive(Debug)]
pub(crate) struct Charge {
    ledger: Arc<Ledger>,
    bytes: u64,
    model: Option<Arc<AtomicU64>>,
    _tenant: Option<Hold>,
}

impl Ledger {
    pub(super) fn new(device: &str, limit: u64) -> Arc<Self> {
        Arc::new(Self { device: device.into(), limit, used: AtomicU64::new(0) })
    }

    /// Counts memory before it is taken: for a tenant, or without an account for the agent or a model of the host.
    ///
    /// # Errors
    /// `QUOTA_EXCEEDED` with the tenant's or the device's limit and what is needed.
    pub(crate) fn charge(
        self: &Arc<Self>,
        account: Option<&Arc<Account>>,
        bytes: u64,
    ) -> Result<Charge, Error> {
        let tenant = account.map(|account| account.hold(Unit::DeviceBytes, bytes)).transpose()?;
        let fits = |used: u64| used.checked_add(bytes).filter(|total| *total <= self.limit);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits) {
            Ok(_) => Ok(Charge { ledger: Arc::clone(self), bytes, model: None, _tenant: tenant }),
            Err(_) => Err(self.full(bytes)),
        }
    }

    /// Whether half of the device's memory stays for others, where somebody can do without.
    ///
    /// # Errors
    /// As [`Self::charge`].
    pub(crate) fn leaves_half(&self, bytes: u64) -> Result<(), Error> {
        if self.used().saturating_add(bytes) <= self.limit / 2 { Ok(()) } else { Err(self.full(bytes)) }
    }

    /// Bytes that are counted.
    pub(crate) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// That so much is not free. What others have of it is not said.
    pub(super) fn full(&self, bytes: u64) -> Error {
        let (device, limit) = (&self.device, self.limit);
        let subject = format!("memory of device {device}");
        let message = format!(
            "{subject} is used up: this call needs {bytes} bytes, all calls and models together may have {limit}; \
             try again when others are done, or ask for device cpu"
        );
        let detail = Detail::Limit { subject, limit, used: bytes, unit: "bytes".into() };
        Error::new(Reason::QuotaExceeded, message).with(detail)
    }

    /// Whether an error is that this device is full: room can be made.
    pub(crate) fn is_full(&self, error: &Error) -> bool {
        let subject = format!("memory of device {}", self.device);
        matches!(error.detail(), Detail::Limit { subject: named, .. } if *named == subject)
    }
}

impl Charge {
    /// Counts it among what a model has, too.
    pub(crate) fn of(mut self, model: &Arc<AtomicU64>) -> Self {
        model.fetch_add(self.bytes, Ordering::Relaxed);
        self.model = Some(Arc::clone(model));
        self
    }
}

impl Drop for Charge {
    fn drop(&mut self) {
        if let Some(model) = &self.model {
            model.fetch_sub(self.bytes, Ordering::Relaxed);
        }
        self.ledger.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}
