//! What comes from the agent, frame by frame.

use std::sync::Arc;

use tonic::Status;
use vaccel_guest::frame::{self, Header};
use vaccel_proto::Reason;

use super::FRAME_BYTES_MAX;
use super::state::{Inside, State, failed};
use super::stream::Stream;
use crate::error::{Failure, Reach};
use crate::unary::broken;

/// Received bytes after which the agent is given its whole window back.
const CONSUMED_BYTES_MAX: u32 = 1 << 30;

/// Bytes of a header block.
const BLOCK_BYTES_MAX: usize = frame::FRAME_BYTES_DEFAULT;

/// Bytes of one setting.
const SETTING_BYTES: usize = 6;

impl State {
    /// Takes in as many frames as there are. Returns how many bytes they had.
    ///
    /// # Errors
    /// What the agent did against the rules.
    pub(super) fn frames(&mut self, input: &[u8]) -> Result<usize, &'static str> {
        let mut rest = input;
        loop {
            if let Some(inside) = self.inside {
                let (content, later) = rest.split_at(rest.len().min(inside.left));
                let (padding, later) = later.split_at(later.len().min(inside.padding));
                self.content(inside.stream, content);
                let left = inside.left - content.len();
                let padding = inside.padding - padding.len();
                self.inside = Some(Inside { left, padding, ..inside });
                rest = later;
                if left + padding > 0 {
                    return Ok(input.len());
                }
                self.inside = None;
                if inside.is_last {
                    self.cut_off(inside.stream);
                }
            }
            let Some((header, content)) = rest.split_first_chunk() else { break };
            let header = Header::decode(header);
            if !self.is_settled && header.kind != frame::SETTINGS {
                return Err("what was reached does not begin as HTTP/2 does");
            }
            if self.block.is_some() != (header.kind == frame::CONTINUATION) {
                return Err("header blocks in disorder");
            }
            if header.kind == frame::DATA {
                let Some(begin) = self.data(header, content)? else { break };
                rest = &content[begin..];
                continue;
            }
            if header.length > frame::FRAME_BYTES_DEFAULT {
                return Err("a frame is longer than this side allows");
            }
            let Some((content, later)) = content.split_at_checked(header.length) else { break };
            match header.kind {
                frame::HEADERS | frame::CONTINUATION => self.headers(header, content)?,
                _ => self.control(header, content)?,
            }
            rest = later;
        }
        Ok(input.len() - rest.len())
    }

    /// The beginning of a DATA frame. Returns how many bytes come before its content; none when they are not all there.
    fn data(&mut self, header: Header, content: &[u8]) -> Result<Option<usize>, &'static str> {
        if header.stream == 0 || header.stream >= self.next {
            return Err("DATA on a stream that is not open");
        }
        if header.length > FRAME_BYTES_MAX as usize {
            return Err("a frame is longer than this side allows");
        }
        let (begin, padding) = match (header.has(frame::PADDED), content.first()) {
            (true, None) => return Ok(None),
            (true, Some(padding)) => (1, usize::from(*padding)),
            (false, _) => (0, 0),
        };
        let left = header.length.checked_sub(begin + padding).ok_or("more padding than frame")?;
        self.consumed = self.consumed.saturating_add(header.length as u32);
        if self.consumed >= CONSUMED_BYTES_MAX {
            let consumed = std::mem::take(&mut self.consumed);
            self.give_window(consumed);
        }
        let (stream, is_last) = (header.stream, header.has(frame::END_STREAM));
        self.inside = Some(Inside { stream, left, padding, is_last });
        Ok(Some(begin))
    }

    fn content(&mut self, id: u32, bytes: &[u8]) {
        let stream = self.streams.get_mut(&id).filter(|stream| stream.outcome.is_none());
        if let Some(stream) = stream
            && let Err(status) = stream.data(bytes)
        {
            self.decide(id, Err(status), true);
        }
    }

    /// A stream ended with its content.
    fn cut_off(&mut self, id: u32) {
        if self.streams.get(&id).is_some_and(|stream| stream.outcome.is_none()) {
            self.decide(id, Err(broken("ends without a status")), false);
        }
    }

    /// HEADERS or CONTINUATION.
    fn headers(&mut self, header: Header, mut content: &[u8]) -> Result<(), &'static str> {
        let is_whole = header.has(frame::END_HEADERS);
        let (id, is_last, block) = match self.block.take() {
            Some((id, is_last, mut block)) => {
                block.extend_from_slice(content);
                if header.stream != id || block.len() > BLOCK_BYTES_MAX {
                    return Err("header blocks in disorder");
                }
                (id, is_last, block)
            }
            None => {
                if header.stream == 0 || header.stream >= self.next {
                    return Err("HEADERS on a stream that is not open");
                }
                if header.has(frame::PADDED) {
                    let (padding, rest) = content.split_first().ok_or("more padding than frame")?;
                    let length = rest.len().checked_sub(usize::from(*padding));
                    content = &rest[..length.ok_or("more padding than frame")?];
                }
                if header.has(frame::PRIORITY) {
                    content = content.get(5..).ok_or("a frame of the wrong length")?;
                }
                let is_last = header.has(frame::END_STREAM);
                if is_whole {
                    return self.block(header.stream, is_last, content);
                }
                (header.stream, is_last, content.to_vec())
            }
        };
        if is_whole {
            return self.block(id, is_last, &block);
        }
        self.block = Some((id, is_last, block));
        Ok(())
    }

    fn block(&mut self, id: u32, is_last: bool, block: &[u8]) -> Result<(), &'static str> {
        // Of a call that was given up nothing is kept, and no table depends on it.
        let stream = self.streams.get_mut(&id).filter(|stream| stream.outcome.is_none());
        let Some(stream) = stream else { return Ok(()) };
        if let Some(outcome) = stream.headers(block, is_last).map_err(|_| "headers that cannot be read")? {
            self.decide(id, outcome, !is_last);
        }
        Ok(())
    }

    /// A frame about the connection, or about a stream as such.
    fn control(&mut self, header: Header, content: &[u8]) -> Result<(), &'static str> {
        if header.kind == frame::SETTINGS && !header.has(frame::ACK) {
            return self.settings(content);
        }
        let number = content.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
        let wanted = match header.kind {
            frame::SETTINGS => 0,
            frame::PING => 8,
            frame::RST_STREAM | frame::WINDOW_UPDATE => 4,
            // With any text behind it.
            frame::GOAWAY => content.len().max(8),
            frame::PUSH_PROMISE => return Err("a PUSH_PROMISE, which was not allowed"),
            _ => return Ok(()),
        };
        if content.len() != wanted {
            return Err("a frame of the wrong length");
        }
        match header.kind {
            frame::PING if !header.has(frame::ACK) => {
                self.output.frame(frame::PING, frame::ACK, 0, |into| into.extend_from_slice(content));
            }
            frame::GOAWAY => self.goaway(number & frame::WINDOW_MAX),
            frame::WINDOW_UPDATE => {
                let of_stream = self.streams.get_mut(&header.stream).map(|stream| &mut stream.window);
                let window = if header.stream == 0 { Some(&mut self.window) } else { of_stream };
                if let Some(window) = window {
                    *window += i64::from(number & frame::WINDOW_MAX);
                    if number == 0 || *window > i64::from(frame::WINDOW_MAX) {
                        return Err("a window that cannot be");
                    }
                }
            }
            frame::RST_STREAM => self.broken_off(header.stream, number),
            _ => {}
        }
        Ok(())
    }

    /// The agent takes no more calls: those after the last one it took can be made again.
    fn goaway(&mut self, last: u32) {
        self.is_leaving = true;
        let head = Arc::clone(&self.head);
        let refused: Vec<u32> = self.streams.range(last.saturating_add(1)..).map(|(id, _)| *id).collect();
        for id in refused {
            let is_open = |stream: &Stream| stream.outcome.is_none() && !stream.is_answered;
            if self.streams.get(&id).is_some_and(is_open) {
                self.decide(id, Err(failed(&head, Reach::Unsent, "it is leaving")), false);
            }
        }
    }

    fn broken_off(&mut self, id: u32, code: u32) {
        let Some(stream) = self.streams.get_mut(&id).filter(|stream| stream.outcome.is_none()) else {
            return;
        };
        // Nothing more is to be sent of it.
        stream.unframed = 0;
        let endpoint = self.head.endpoint();
        let (message, reach) = match code {
            frame::REFUSED_STREAM => (format!("{endpoint} did not take the call"), Reach::Unsent),
            code => (format!("{endpoint} broke the call off: code {code} of HTTP/2"), Reach::Sent),
        };
        let failure = Failure { reason: Reason::Unreachable, message, reach };
        self.decide(id, Err(Status::from_error(Box::new(failure))), false);
    }

    fn settings(&mut self, content: &[u8]) -> Result<(), &'static str> {
        if !content.len().is_multiple_of(SETTING_BYTES) {
            return Err("a frame of the wrong length");
        }
        for setting in content.chunks_exact(SETTING_BYTES) {
            let (name, value) = setting.split_at(2);
            let value = value.first_chunk().map_or(0, |bytes| u32::from_be_bytes(*bytes));
            match name.first_chunk().map_or(0, |bytes| u16::from_be_bytes(*bytes)) {
                frame::INITIAL_WINDOW_SIZE => {
                    let more = i64::from(value) - self.stream_window;
                    self.stream_window = i64::from(value);
                    // Streams that are open gain or lose the difference.
                    let windows = self.streams.values_mut().map(|stream| {
                        stream.window += more;
                        stream.window
                    });
                    if windows.chain([self.stream_window]).any(|window| window > i64::from(frame::WINDOW_MAX))
                    {
                        return Err("a window that cannot be");
                    }
                }
                frame::MAX_FRAME_SIZE => {
                    self.frame_bytes = value as usize;
                    if !(frame::FRAME_BYTES_DEFAULT..=frame::FRAME_BYTES_MAX).contains(&self.frame_bytes) {
                        return Err("a frame size that cannot be");
                    }
                }
                frame::MAX_CONCURRENT_STREAMS => self.streams_max = value as usize,
                _ => {}
            }
        }
        self.is_settled = true;
        self.output.frame(frame::SETTINGS, frame::ACK, 0, |_| {});
        Ok(())
    }
}
