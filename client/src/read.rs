//! A file of a resource on its way back from the agent.

use bytes::Bytes;
use tonic::{Request, Streaming};
use vaccel_proto::limits::DEADLINE_MAX;
use vaccel_proto::v1::resources_client::ResourcesClient;
use vaccel_proto::v1::{ReadResourceReply, ReadResourceRequest};
use vaccel_proto::{Error, Reason};

use crate::error::of_status;
use crate::session::{Resource, Session};

/// A file that is being read, a piece at a time; see [`Session::read_resource`].
#[derive(Debug)]
pub struct ResourceReader {
    session: Session,
    request: ReadResourceRequest,
    /// None when the rest has to be asked for.
    pieces: Option<Streaming<ReadResourceReply>>,
    is_done: bool,
}

impl ResourceReader {
    pub(crate) async fn open(
        session: Session,
        resource: &Resource,
        file: &str,
        offset: u64,
        length: u64,
    ) -> Result<Self, Error> {
        let request = ReadResourceRequest {
            session: String::new(),
            resource: resource.id().into(),
            file: file.into(),
            offset,
            length,
        };
        let pieces = Some(ask(&session, &request).await?);
        Ok(Self { session, request, pieces, is_done: false })
    }

    /// The next piece, none at the end. When the connection broke, the rest is asked for on another one.
    ///
    /// # Errors
    /// `DEADLINE` when no piece comes for the session's deadline, and those of [`Session::read_resource`].
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        let mut has_asked_again = false;
        while !self.is_done {
            let pieces = match &mut self.pieces {
                Some(pieces) => pieces,
                none => none.insert(ask(&self.session, &self.request).await?),
            };
            let deadline = self.session.deadline();
            match deadline.bound("waiting for the next piece", pieces.message()).await? {
                Ok(Some(piece)) => {
                    self.took(piece.data.len() as u64);
                    return Ok(Some(piece.data));
                }
                Ok(None) => self.is_done = true,
                Err(status) => {
                    let error = of_status(&status);
                    if has_asked_again || !is_passing(error.reason()) {
                        return Err(error);
                    }
                    has_asked_again = true;
                    self.pieces = None;
                }
            }
        }
        Ok(None)
    }

    /// All that follows, in one piece.
    ///
    /// # Errors
    /// Those of [`Self::next`].
    pub async fn rest(&mut self) -> Result<Vec<u8>, Error> {
        let mut all = Vec::new();
        while let Some(piece) = self.next().await? {
            all.extend_from_slice(&piece);
        }
        Ok(all)
    }

    fn took(&mut self, bytes: u64) {
        self.request.offset += bytes;
        if self.request.length > 0 {
            self.request.length = self.request.length.saturating_sub(bytes);
            // A length of 0 would ask for everything.
            self.is_done = self.request.length == 0;
        }
    }
}

/// Whether the rest may come another time. A deadline is one of the agent's that ended a long read.
fn is_passing(reason: Reason) -> bool {
    matches!(reason, Reason::Unreachable | Reason::ShuttingDown | Reason::Deadline)
}

async fn ask(
    session: &Session,
    request: &ReadResourceRequest,
) -> Result<Streaming<ReadResourceReply>, Error> {
    session
        .call(|wire, _, id| {
            let mut request = Request::new(ReadResourceRequest { session: id, ..request.clone() });
            // The deadline is for the beginning; the whole may take as long as it takes.
            request.set_timeout(DEADLINE_MAX);
            async move { ResourcesClient::new(wire).read(request).await }
        })
        .await
}
