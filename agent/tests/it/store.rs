//! Resources on disk, as guests of real agents have them: uploads that are cut, agents that are killed, files that are
//! damaged, and what all of it may cost.

mod damage;
mod kill;
mod read;
mod resume;
mod share;

use std::path::{Path, PathBuf};

use bytes::Bytes;
use sha2::{Digest, Sha256};
use tonic::codegen::tokio_stream;
use vaccel_client::proto::limits::CHUNK_BYTES_MAX;
use vaccel_client::proto::v1::resources_client::ResourcesClient;
use vaccel_client::proto::v1::{File, MissingFile, RegisterResourceRequest, UploadRequest};
use vaccel_client::{Error, Link, ResourceKind};

/// Numbers that are the same in every run (SplitMix64).
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn bytes(&mut self, count: usize) -> Bytes {
        let mut bytes: Vec<u8> = (0..count.div_ceil(8)).flat_map(|_| self.next().to_le_bytes()).collect();
        bytes.truncate(count);
        bytes.into()
    }
}

fn sha256(content: &[u8]) -> Bytes {
    Bytes::copy_from_slice(&Sha256::digest(content))
}

fn hexadecimal(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn file(name: &str, content: &[u8]) -> File {
    File { name: name.into(), size: content.len() as u64, sha256: sha256(content) }
}

/// What is missing of a resource of one file; nothing when the session holds it now.
async fn missing(link: &Link, session: &str, content: &[u8]) -> Result<Vec<MissingFile>, Error> {
    let (session, kind) = (session.to_owned(), ResourceKind::Data.into());
    let request = RegisterResourceRequest { session, kind, files: vec![file("f", content)] };
    let reply = ResourcesClient::new(link.clone()).register(request).await;
    reply.map(|reply| reply.into_inner().missing).map_err(|status| Error::from_status(&status))
}

/// Sends a part of a file; returns how much of it the agent has then.
async fn upload(
    link: &Link,
    session: &str,
    content: &Bytes,
    part: std::ops::Range<usize>,
) -> Result<u64, Error> {
    let first = UploadRequest {
        session: session.into(),
        sha256: sha256(content),
        size: content.len() as u64,
        offset: part.start as u64,
        data: content.slice(part.start..part.end.min(part.start + CHUNK_BYTES_MAX)),
    };
    let rest = (part.start + CHUNK_BYTES_MAX..part.end).step_by(CHUNK_BYTES_MAX).map({
        let content = content.clone();
        move |at| {
            let data = content.slice(at..part.end.min(at + CHUNK_BYTES_MAX));
            UploadRequest { data, ..UploadRequest::default() }
        }
    });
    let messages = tokio_stream::iter(std::iter::once(first).chain(rest));
    let reply = ResourcesClient::new(link.clone()).upload(messages).await;
    reply.map(|reply| reply.into_inner().offset).map_err(|status| Error::from_status(&status))
}

/// All files of the store of an agent in this folder, below `complete` or `partial`.
fn stored(folder: &Path, kind: &str) -> Vec<PathBuf> {
    let entries = |path: &Path| -> Vec<PathBuf> {
        std::fs::read_dir(path).into_iter().flatten().map(|entry| entry.unwrap().path()).collect()
    };
    let tenants = entries(&folder.join("store/v1"));
    let mut found: Vec<_> = tenants.iter().flat_map(|tenant| entries(&tenant.join(kind))).collect();
    found.sort();
    found
}
