//! Getting a region from an agent: a connection of its own, over which the file descriptor comes.

use std::any::Any;
use std::fmt;
use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::AtomicUsize;

use rustix::fs::{SealFlags, fcntl_get_seals, fstat};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest};
use tokio::net::{TcpStream, UnixStream};
use vaccel_proto::Endpoint;
use vaccel_proto::endpoint::Authority;

use super::{Mapping, Region, Slots};

/// What a connection for memory begins with; the number of bytes and a line's end follow.
pub const PREFACE: &[u8] = b"VACCEL-MEMORY/1 ";

/// Bytes of an answer: the longest are errors in words.
const ANSWER_BYTES_MAX: usize = 512;

/// Whom memory is asked of.
pub(super) struct Source {
    endpoint: Endpoint,
    token: Option<String>,
}

impl fmt::Debug for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source").field("endpoint", &self.endpoint).finish_non_exhaustive()
    }
}

impl Source {
    pub(super) fn new(endpoint: &Endpoint, token: Option<&str>) -> Self {
        Self { endpoint: endpoint.clone(), token: token.map(str::to_owned) }
    }

    /// Whether an agent there can share memory: other sockets lead to other machines. Of TCP that is so where the
    /// address is this machine's own, or its name says so.
    pub(super) fn is_near(&self) -> bool {
        match &self.endpoint {
            Endpoint::Unix(_) | Endpoint::UnixAbstract(_) => true,
            Endpoint::Tcp(Authority { host, .. }) => {
                host == "localhost" || host.parse().is_ok_and(|ip: IpAddr| ip.is_loopback())
            }
            _ => false,
        }
    }

    /// Asks for a region.
    ///
    /// # Errors
    /// The socket's; and that the agent, or whatever answered, gave none.
    pub(super) async fn open(&self, bytes: usize) -> io::Result<Region> {
        let wish = match &self.token {
            Some(token) => format!("{bytes} {token}"),
            None => bytes.to_string(),
        };
        let (connection, (answer, file)): (Box<dyn Any + Send + Sync>, _) = match &self.endpoint {
            Endpoint::Tcp(authority) => {
                let (connection, annex, ticket) = directed(authority, &wish).await?;
                (connection, ask(&mut connect(&annex).await?, &ticket).await?)
            }
            endpoint => {
                let mut stream = connect(endpoint).await?;
                let answer = ask(&mut stream, &wish).await?;
                (Box::new(stream), answer)
            }
        };
        let (Some(name), Some(file)) = (answer.trim_end().strip_prefix("OK "), file) else {
            return Err(io::Error::other(answer));
        };
        // From whoever listens there: what could be made shorter under this process would end it.
        let size = fstat(&file)?.st_size;
        if !fcntl_get_seals(&file)?.contains(SealFlags::SHRINK)
            || u64::try_from(size).ok() < Some(bytes as u64)
        {
            return Err(io::Error::other("memory that is too short, or could be made so"));
        }
        Ok(Region {
            name: name.to_owned(),
            mapping: Mapping::new(&file, bytes)?,
            slots: Mutex::new(Slots::new(bytes)),
            lost: AtomicUsize::new(0),
            reply_bytes: AtomicUsize::new(0),
            _connection: connection,
        })
    }
}

/// Asks an agent on TCP, which carries no descriptors: it says where a ticket gets the memory.
async fn directed(
    Authority { host, port }: &Authority,
    wish: &str,
) -> io::Result<(Box<dyn Any + Send + Sync>, Endpoint, String)> {
    let mut stream = TcpStream::connect((host.as_str(), *port)).await?;
    stream.write_all(&line(wish)).await?;
    let mut answer = String::new();
    let mut reader = BufReader::new(stream).take(ANSWER_BYTES_MAX as u64);
    reader.read_line(&mut answer).await?;
    let place = answer.trim_end().strip_prefix("AT ").and_then(|place| place.split_once(' '));
    let (name, ticket) = place.ok_or_else(|| io::Error::other(answer.clone()))?;
    Ok((Box::new(reader), Endpoint::UnixAbstract(name.to_owned()), ticket.to_owned()))
}

fn line(wish: &str) -> Vec<u8> {
    [PREFACE, wish.as_bytes(), b"\n"].concat()
}

async fn connect(endpoint: &Endpoint) -> io::Result<UnixStream> {
    match endpoint {
        Endpoint::Unix(path) => UnixStream::connect(path).await,
        Endpoint::UnixAbstract(name) => UnixStream::connect(format!("\0{name}")).await,
        _ => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// The agent's answer, a line, and what came with it.
async fn ask(stream: &mut UnixStream, wish: &str) -> io::Result<(String, Option<OwnedFd>)> {
    stream.write_all(&line(wish)).await?;
    let mut answer = Vec::new();
    let mut file = None;
    while answer.last() != Some(&b'\n') {
        let mut part = [0; ANSWER_BYTES_MAX];
        let (count, came) = stream.async_io(Interest::READABLE, || receive(stream, &mut part)).await?;
        answer.extend_from_slice(&part[..count]);
        file = file.or(came);
        if count == 0 || answer.len() > part.len() {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok((String::from_utf8_lossy(&answer).into_owned(), file))
}

/// What came, and a file descriptor if one came with it.
fn receive(stream: &UnixStream, into: &mut [u8]) -> io::Result<(usize, Option<OwnedFd>)> {
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = recvmsg(stream, &mut [io::IoSliceMut::new(into)], &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let file = control.drain().find_map(|message| match message {
        RecvAncillaryMessage::ScmRights(mut files) => files.next(),
        _ => None,
    });
    Ok((received.bytes, file))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::AsFd;
    use std::os::unix::net::UnixListener;

    use rustix::fs::{MemfdFlags, fcntl_add_seals, ftruncate, memfd_create};
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::*;

    /// Gives whoever asks a file of so many bytes, sealed so.
    fn impostor(listener: &UnixListener, bytes: u64, seals: SealFlags) {
        let (mut connection, _) = listener.accept().unwrap();
        let mut asked = [0; 21];
        connection.read_exact(&mut asked).unwrap();
        assert_eq!(&asked, b"VACCEL-MEMORY/1 8192\n");
        let file = memfd_create("impostor", MemfdFlags::ALLOW_SEALING).unwrap();
        ftruncate(&file, bytes).unwrap();
        fcntl_add_seals(&file, seals).unwrap();
        let files = [file.as_fd()];
        let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&files));
        sendmsg(&connection, &[io::IoSlice::new(b"OK name\n")], &mut control, SendFlags::empty()).unwrap();
    }

    #[tokio::test]
    async fn memory_that_could_be_made_shorter_is_not_taken() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let source = Source::new(&Endpoint::Unix(path), None);
        for (bytes, seals, is_good) in [
            (8192, SealFlags::GROW, false),
            (8191, SealFlags::SHRINK, false),
            (8192, SealFlags::SHRINK, true),
        ] {
            let listener = listener.try_clone().unwrap();
            let serving = std::thread::spawn(move || impostor(&listener, bytes, seals));
            assert_eq!(source.open(8192).await.is_ok(), is_good, "{bytes} {seals:?}");
            serving.join().unwrap();
        }
    }
}
