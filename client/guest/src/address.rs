//! Where an agent is: `vsock://CID:PORT`, `unix://PATH`, `unix://@NAME` or `tcp://IP:PORT`.
//!
//! It is the grammar of the whole project (`proto/src/endpoint.rs`), as far as a guest without names of hosts, TLS and
//! the files of a VMM can use it.

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::text::Text;

/// Longest path of a unix socket, in bytes: the kernel's place for it, without the NUL at its end.
pub const UNIX_PATH_BYTES_MAX: usize = 107;

/// One address.
#[derive(Clone, Copy, Debug)]
pub enum Address {
    /// AF_VSOCK.
    Vsock {
        /// Context id: 2 is the host.
        cid: u32,
        /// Port.
        port: u32,
    },
    /// A unix socket.
    Unix {
        /// Its path, or its name.
        path: Text<UNIX_PATH_BYTES_MAX>,
        /// It is a name in the abstract namespace.
        is_abstract: bool,
    },
    /// TCP.
    Tcp {
        /// Address of the host.
        ip: IpAddr,
        /// Port.
        port: u16,
    },
}

/// A text is no address of an agent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NoAddress(&'static str);

impl NoAddress {
    /// What was expected.
    pub fn expected(&self) -> &'static str {
        self.0
    }
}

impl core::fmt::Display for NoAddress {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str("the agent's address: expected ")?;
        f.write_str(self.0)
    }
}

impl core::error::Error for NoAddress {}

impl core::str::FromStr for Address {
    type Err = NoAddress;

    fn from_str(text: &str) -> Result<Self, NoAddress> {
        let scheme = |name: &str| {
            let (scheme, rest) = before_and_after(text, text.bytes().position(|byte| byte == b':')?)?;
            rest.strip_prefix("//").filter(|_| scheme.eq_ignore_ascii_case(name))
        };
        if let Some(rest) = scheme("vsock") {
            return vsock(rest)
                .ok_or(NoAddress("vsock://CID:PORT with a CID of 1 to 4294967294, host or local"));
        }
        if let Some(rest) = scheme("unix") {
            return unix(rest).ok_or(NoAddress("unix://PATH or unix://@NAME of at most 107 bytes"));
        }
        if let Some(rest) = scheme("tcp") {
            let (host, port) = at_last_colon(rest).unwrap_or((rest, ""));
            let address = ip(host).zip(number(port).filter(|port| *port > 0));
            let address =
                address.and_then(|(ip, port)| Some(Self::Tcp { ip, port: u16::try_from(port).ok()? }));
            return address.ok_or(NoAddress("tcp://IP:PORT with a numeric IP, a version 6 one in brackets"));
        }
        Err(NoAddress("vsock://CID:PORT, unix://PATH or tcp://IP:PORT"))
    }
}

/// The text before and after the byte at an index. The standard library's ways to split can panic, as far as the
/// compiler knows.
fn before_and_after(text: &str, at: usize) -> Option<(&str, &str)> {
    Some((text.get(..at)?, text.get(at + 1..)?))
}

fn at_last_colon(text: &str) -> Option<(&str, &str)> {
    before_and_after(text, text.bytes().rposition(|byte| byte == b':')?)
}

/// The text up to a separator, which and what follows is left; all of it at the end.
fn next_part<'a>(rest: &mut Option<&'a str>, separator: u8) -> Option<&'a str> {
    let text = (*rest)?;
    let cut = text.bytes().position(|byte| byte == separator).and_then(|at| before_and_after(text, at));
    *rest = cut.map(|(_, after)| after);
    Some(cut.map_or(text, |(part, _)| part))
}

/// A number in decimal digits.
fn number(digits: &str) -> Option<u32> {
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    is_number.then(|| digits.parse().ok()).flatten()
}

fn vsock(rest: &str) -> Option<Address> {
    let (cid, port) = at_last_colon(rest)?;
    let cid = match cid {
        _ if cid.eq_ignore_ascii_case("host") => 2,
        _ if cid.eq_ignore_ascii_case("local") => 1,
        // The last one is "any", which is for listening.
        _ => number(cid).filter(|cid| (1..u32::MAX).contains(cid))?,
    };
    let port = number(port).filter(|port| (1..u32::MAX).contains(port))?;
    Some(Address::Vsock { cid, port })
}

fn unix(rest: &str) -> Option<Address> {
    let (path, is_abstract) = rest.strip_prefix('@').map_or((rest, false), |name| (name, true));
    let fits = !path.is_empty() && rest.len() <= UNIX_PATH_BYTES_MAX && !path.bytes().any(|byte| byte == 0);
    fits.then(|| Address::Unix { path: path.into(), is_abstract })
}

/// A numeric address; parsed here, since the standard library's parser is larger than all of this file.
fn ip(host: &str) -> Option<IpAddr> {
    if let Some(host) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        return ip6(host).map(IpAddr::V6);
    }
    let mut octets = [0; 4];
    let mut rest = Some(host);
    for octet in &mut octets {
        *octet = number(next_part(&mut rest, b'.')?).and_then(|octet| u8::try_from(octet).ok())?;
    }
    rest.is_none().then(|| IpAddr::V4(Ipv4Addr::from(octets)))
}

fn ip6(host: &str) -> Option<Ipv6Addr> {
    let groups = |text: &str, into: &mut [u16; 8]| {
        let (mut rest, mut count) = (Some(text).filter(|text| !text.is_empty()), 0);
        while let Some(group) = next_part(&mut rest, b':') {
            let fits = (1..=4).contains(&group.len()) && group.bytes().all(|byte| byte.is_ascii_hexdigit());
            *into.get_mut(count)? = fits.then(|| u16::from_str_radix(group, 16).ok()).flatten()?;
            count += 1;
        }
        Some(count)
    };
    let (mut groups_before, mut groups_after) = ([0; 8], [0; 8]);
    let gap = host.as_bytes().windows(2).position(|pair| pair == b"::");
    let Some((before, after)) = gap.and_then(|gap| Some((host.get(..gap)?, host.get(gap + 2..)?))) else {
        return (groups(host, &mut groups_before)? == 8).then(|| Ipv6Addr::from(groups_before));
    };
    let (before, after) = (groups(before, &mut groups_before)?, groups(after, &mut groups_after)?);
    let begin = 8_usize.checked_sub(after).filter(|begin| before < *begin)?;
    for (place, group) in groups_before.get_mut(begin..)?.iter_mut().zip(groups_after) {
        *place = group;
    }
    Some(Ipv6Addr::from(groups_before))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vaccel_proto::Endpoint;

    /// Both parsers agree on what a guest can use.
    #[test]
    fn the_grammar_is_that_of_the_project() {
        for text in [
            "vsock://2:2048",
            "VSOCK://host:1",
            "vsock://local:9",
            "vsock://any:1",
            "vsock://0:1",
            "vsock://4294967295:1",
            "vsock://4294967296:1",
            "vsock://2",
            "vsock://2:",
            "vsock://2:0",
            "vsock://2:4294967295",
            "vsock://2:+1",
            "unix:///run/v.sock",
            "unix://@name",
            "unix://",
            "unix://@",
            "unix:///a\0b",
            "tcp://127.0.0.1:65500",
            "tcp://[::1]:65500",
            "tcp://127.0.0.1:0",
            "tcp://127.0.0.1:65536",
            "tcp://::1:80",
            "tcp://:80",
            "http://127.0.0.1:1",
            "/run/v.sock",
        ] {
            let theirs = text.parse::<Endpoint>().and_then(Endpoint::for_dialing);
            assert_eq!(text.parse::<Address>().is_ok(), theirs.is_ok(), "{text}");
        }
        let long = std::format!("unix:///{}", "x".repeat(UNIX_PATH_BYTES_MAX));
        assert!(long.parse::<Address>().is_err() && long.parse::<Endpoint>().is_err());
        assert!(long[..long.len() - 1].parse::<Address>().is_ok());
    }

    #[test]
    fn numeric_addresses_are_those_of_the_standard_library() {
        for host in [
            "0.0.0.0",
            "255.255.255.255",
            "256.1.1.1",
            "1.2.3",
            "1.2.3.4.5",
            "1..2.3",
            "",
            "a.b.c.d",
            "1.2.3.4 ",
        ] {
            assert_eq!(ip(host), host.parse::<Ipv4Addr>().ok().map(IpAddr::V4), "{host}");
        }
        for host in [
            "::",
            "::1",
            "1::",
            "fe80::1:2",
            "1:2:3:4:5:6:7:8",
            "1:2:3:4:5:6:7",
            "1::2::3",
            "12345::",
            "1:2:3:4:5:6:7:8:9",
            ":1",
            "1::2:3:4:5:6:7:8",
        ] {
            assert_eq!(ip6(host), host.parse::<Ipv6Addr>().ok(), "{host}");
        }
    }
}
