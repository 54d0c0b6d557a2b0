//! `vaccel info` and `vaccel ops`.

use serde_json::{Value, json};
use vaccel_client::Client;
use vaccel_client::proto::v1::{EngineInfo, InfoReply, OperationInfo};

use crate::output::{Failure, Output, bytes, plain, table};

pub(crate) async fn info(client: &Client, output: &mut Output) -> Result<(), Failure> {
    let info = client.info().await?;
    let (limits, usage) = (info.limits.unwrap_or_default(), info.usage.unwrap_or_default());
    output.document(json!({
        "address": client.endpoint().to_string(),
        "version": info.version,
        "tenant": info.tenant,
        "operations": operations(&info),
        "engines": info.engines.iter().map(engine).collect::<Vec<_>>(),
        "limits": {
            "message_bytes_max": limits.message_bytes_max,
            "chunk_bytes_max": limits.chunk_bytes_max,
            "session_lease_ms": limits.session_lease_ms,
            "sessions_max": limits.sessions_max,
            "calls_in_flight_max": limits.calls_in_flight_max,
            "resource_bytes_max": limits.resource_bytes_max,
        },
        "usage": {
            "sessions": usage.sessions,
            "calls_in_flight": usage.calls_in_flight,
            "resource_bytes": usage.resource_bytes,
            "cached_bytes": usage.cached_bytes,
        },
    }));
    let mut rows = vec![
        row("agent", &format!("version {} at {}", info.version, client.endpoint())),
        row("tenant", &info.tenant),
    ];
    for operation in &info.operations {
        rows.push(row("operation", &operation.name));
    }
    for engine in &info.engines {
        let state = if engine.absent_because.is_empty() {
            format!("on {}", engine.devices.join(", "))
        } else {
            format!("absent: {}", engine.absent_because)
        };
        rows.push(row("engine", &format!("{} {} {state}", engine.name, engine.version)));
    }
    let of = |used: u64, limit: u64| format!("{used} of {limit}");
    rows.extend([
        row("sessions", &of(usage.sessions, limits.sessions_max)),
        row("calls", &of(usage.calls_in_flight, limits.calls_in_flight_max)),
        row("resources", &format!("{} of {}", bytes(usage.resource_bytes), bytes(limits.resource_bytes_max))),
        row("cached", &bytes(usage.cached_bytes)),
        row("message", &format!("at most {}", bytes(limits.message_bytes_max))),
        row("lease", &format!("{} s", limits.session_lease_ms / 1000)),
    ]);
    output.text(&table(&rows))
}

pub(crate) async fn ops(client: &Client, output: &mut Output) -> Result<(), Failure> {
    let info = client.info().await?;
    output.document(operations(&info));
    let row = |operation: &OperationInfo| vec![plain(&operation.name), plain(&operation.summary)];
    output.text(&table(&info.operations.iter().map(row).collect::<Vec<_>>()))
}

fn row(name: &str, value: &str) -> Vec<String> {
    vec![name.into(), plain(value)]
}

fn operations(info: &InfoReply) -> Value {
    info.operations.iter().map(|o| json!({"name": o.name, "summary": o.summary})).collect()
}

fn engine(engine: &EngineInfo) -> Value {
    json!({
        "name": engine.name,
        "version": engine.version,
        "devices": engine.devices,
        "absent_because": engine.absent_because,
    })
}
