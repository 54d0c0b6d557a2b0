//! Environment variables, the same for the library and the command.

use std::path::Path;

use vaccel_proto::limits::LOCAL_ADDRESS_DEFAULT;
use vaccel_proto::{Endpoint, Error, Reason};

use crate::tls::{Pem, Tls};

/// Where the agent is; vAccel's own name for it.
pub const ADDRESS: &str = "VACCEL_RPC_ADDRESS";
/// The older name, read when [`ADDRESS`] is not set.
pub const ADDRESS_OLD: &str = "VACCEL_RPC_ADDR";
/// PEM file of the authorities that may vouch for the agent.
pub const TLS_CA: &str = "VACCEL_TLS_CA";
/// PEM file of the client's certificate chain.
pub const TLS_CERT: &str = "VACCEL_TLS_CERT";
/// PEM file of its private key.
pub const TLS_KEY: &str = "VACCEL_TLS_KEY";
/// File that holds the bearer token.
pub const TOKEN_FILE: &str = "VACCEL_TOKEN_FILE";
/// The bearer token itself.
pub const TOKEN: &str = "VACCEL_TOKEN";

/// The agent's address: [`ADDRESS`], then [`ADDRESS_OLD`], then the local default.
///
/// # Errors
/// `BAD_ARGUMENT` for a value that is not an address.
pub fn address() -> Result<Endpoint, Error> {
    address_from(&read)
}

/// TLS files: [`TLS_CA`], [`TLS_CERT`] and [`TLS_KEY`].
///
/// # Errors
/// `BAD_ARGUMENT` for a certificate without a key, or the other way round.
pub fn tls() -> Result<Tls, Error> {
    tls_from(&read)
}

/// The token: the content of [`TOKEN_FILE`], then [`TOKEN`].
///
/// # Errors
/// `BAD_ARGUMENT` for a file that cannot be read.
pub fn token() -> Result<Option<String>, Error> {
    match read(TOKEN_FILE) {
        Some(path) => token_in(Path::new(&path)).map(Some),
        None => Ok(read(TOKEN)),
    }
}

/// The token in a file, without the line end that editors leave.
///
/// # Errors
/// `BAD_ARGUMENT` for a file that cannot be read.
pub fn token_in(path: &Path) -> Result<String, Error> {
    let unreadable =
        |e| Error::new(Reason::BadArgument, format!("cannot read the token in {}: {e}", path.display()));
    Ok(std::fs::read_to_string(path).map_err(unreadable)?.trim().to_owned())
}

/// Set and not empty: an empty variable is how many tools unset one.
fn read(name: &str) -> Option<String> {
    std::env::var(name).ok().filter(|value| !value.is_empty())
}

fn address_from(read: &dyn Fn(&str) -> Option<String>) -> Result<Endpoint, Error> {
    let (name, text) = [ADDRESS, ADDRESS_OLD]
        .into_iter()
        .find_map(|name| Some((name, read(name)?)))
        .unwrap_or(("the default", LOCAL_ADDRESS_DEFAULT.to_owned()));
    text.parse().map_err(|e| Error::new(Reason::BadArgument, format!("{name}: {e}")))
}

fn tls_from(read: &dyn Fn(&str) -> Option<String>) -> Result<Tls, Error> {
    let file = |name| read(name).map(|path| Pem::File(path.into()));
    let identity = match (file(TLS_CERT), file(TLS_KEY)) {
        (Some(certificate), Some(key)) => Some((certificate, key)),
        (None, None) => None,
        _ => {
            let message = format!("{TLS_CERT} and {TLS_KEY} go together, and only one of them is set");
            return Err(Error::new(Reason::BadArgument, message));
        }
    };
    Ok(Tls { ca: file(TLS_CA), identity, server_name: None })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with<'a>(set: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<String> + 'a {
        move |name| set.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned())
    }

    #[test]
    fn the_newer_address_wins_and_there_is_a_default() {
        let address = |set: &[(&str, &str)]| address_from(&with(set)).map(|endpoint| endpoint.to_string());
        let (new, old) = ((ADDRESS, "unix:///new"), (ADDRESS_OLD, "vsock://2:2048"));
        assert_eq!(address(&[old, new]).unwrap(), "unix:///new");
        assert_eq!(address(&[old]).unwrap(), "vsock://2:2048");
        assert_eq!(address(&[]).unwrap(), LOCAL_ADDRESS_DEFAULT);
        assert!(address(&[(ADDRESS_OLD, "nowhere")]).unwrap_err().message().starts_with(ADDRESS_OLD));
    }

    #[test]
    fn a_certificate_needs_its_key() {
        assert!(tls_from(&with(&[(TLS_CERT, "c.pem")])).is_err());
        let tls = tls_from(&with(&[(TLS_CERT, "c.pem"), (TLS_KEY, "k.pem"), (TLS_CA, "ca.pem")])).unwrap();
        assert!(tls.ca.is_some() && tls.identity.is_some());
    }
}
