//! Reading request bodies, within bounds.

use std::time::Duration;

use apiserver_machinery::status::Status;
use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::Body;

/// The largest body, as in kube-apiserver.
pub(crate) const BODY_BYTES_MAX: usize = 3 << 20;

/// How much of a body that is too large is still read: a client that is writing would not see the answer otherwise.
const DRAIN_BYTES_MAX: usize = 64 << 20;
const DRAIN_TIME_MAX: Duration = Duration::from_secs(5);

/// Reads a whole body.
///
/// # Errors
/// 413 for more than [`BODY_BYTES_MAX`], 400 where the client stopped in the middle.
pub(crate) async fn read<B>(mut body: B) -> Result<Bytes, Status>
where
    B: Body<Data = Bytes> + Unpin,
    B::Error: std::fmt::Display,
{
    let mut whole = BytesMut::new();
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Status::bad_request(format!("the body could not be read: {error}")))?;
        let Ok(data) = frame.into_data() else { continue };
        if whole.len() + data.len() > BODY_BYTES_MAX {
            drain(body).await;
            return Err(Status::request_entity_too_large(&format!("limit is {BODY_BYTES_MAX}")));
        }
        if whole.is_empty() && body.is_end_stream() {
            return Ok(data);
        }
        whole.extend_from_slice(&data);
    }
    Ok(whole.freeze())
}

async fn drain<B: Body<Data = Bytes> + Unpin>(mut body: B) {
    let all = async {
        let mut bytes = 0;
        while let Some(Ok(frame)) = body.frame().await {
            bytes += frame.data_ref().map_or(0, Bytes::len);
            if bytes > DRAIN_BYTES_MAX {
                return;
            }
        }
    };
    // Whether it ended or not, the answer is the same.
    let _ = tokio::time::timeout(DRAIN_TIME_MAX, all).await;
}
