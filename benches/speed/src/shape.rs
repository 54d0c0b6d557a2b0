//! What calls carry, and over what.

use std::fmt;

/// Bytes that come back from a call that is no echo, at most.
pub(crate) const DOWN_BYTES_MAX: usize = 4096;

/// What one call carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Shape {
    /// Bytes that go up; 0 is a call of nothing.
    pub(crate) up: usize,
    /// Whether all of them come back.
    pub(crate) echo: bool,
}

impl Shape {
    /// All that are measured.
    pub(crate) const ALL: [Self; 7] = [
        Self::up(0),
        Self::up(1 << 10),
        Self::up(64 << 10),
        Self::IMAGE,
        Self::up(4 << 20),
        Self::LARGE,
        Self { up: 16 << 20, echo: true },
    ];

    /// What a guest calls with that is one of many.
    pub(crate) const SHORT: [Self; 2] = [Self::EMPTY, Self::up(64 << 10)];

    /// Nothing.
    pub(crate) const EMPTY: Self = Self::up(0);

    /// One image for a network of today: `f32[1, 3, 224, 224]`.
    pub(crate) const IMAGE: Self = Self::up(602_112);

    /// As large as a call in one message is meant to be.
    pub(crate) const LARGE: Self = Self::up(16 << 20);

    /// More than one message may carry.
    pub(crate) const HUGE: Self = Self::up(64 << 20);

    const fn up(up: usize) -> Self {
        Self { up, echo: false }
    }

    /// Bytes that come back.
    pub(crate) fn down(self) -> usize {
        if self.echo { self.up } else { self.up.min(DOWN_BYTES_MAX) }
    }

    /// Calls of one row before the next has its turn.
    pub(crate) fn calls_in_burst(self) -> usize {
        match self.up {
            ..4096 => 50,
            4096..100_000 => 30,
            100_000..1_000_000 => 10,
            1_000_000..10_000_000 => 5,
            _ => 3,
        }
    }
}

impl fmt::Display for Shape {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.echo { " echo" } else { "" };
        match self.up {
            up if up >= 1 << 20 && up % (1 << 20) == 0 => write!(f, "{} MiB{what}", up >> 20),
            up if up >= 1 << 10 && up % (64 << 10) == 0 || up == 1 << 10 => {
                write!(f, "{} KiB{what}", up >> 10)
            }
            up => write!(f, "{up} B{what}"),
        }
    }
}

/// What carries the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) enum Socket {
    Tcp,
    Unix,
}

impl Socket {
    pub(crate) const ALL: [Self; 2] = [Self::Tcp, Self::Unix];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Unix => "unix",
        }
    }
}
