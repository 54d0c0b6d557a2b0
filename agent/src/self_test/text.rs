//! The record for people.

use std::fmt::{self, Write};

use super::{Record, Verdict};

/// The whole record, as lines.
pub(super) fn of(record: &Record, verdict: Verdict) -> String {
    let mut out = String::new();
    // Writing to a string does not fail.
    let _ = found(&mut out, record);
    if verdict != Verdict::Absent {
        let _ = figures(&mut out, record);
        let _ = judged(&mut out, record);
    }
    let _ = match verdict {
        Verdict::Passed => writeln!(out, "\npassed"),
        Verdict::Failed => writeln!(out, "\nfailed"),
        Verdict::Absent => writeln!(out, "\na device is required (--gpu) and cannot be used"),
    };
    out
}

fn found(out: &mut String, record: &Record) -> fmt::Result {
    let machine = &record.machine;
    writeln!(out, "vaccel-agent {}", record.version)?;
    writeln!(
        out,
        "machine  {} cores of {}, {} GiB, Linux {}",
        machine.cores,
        machine.processor,
        machine.memory_bytes >> 30,
        machine.kernel
    )?;
    for library in &record.accelerators.libraries {
        let place = library.loaded.as_deref().unwrap_or("not found");
        writeln!(out, "library  {} ({}): {place}", library.purpose, library.names.join(" or "))?;
    }
    for device in &record.accelerators.devices {
        let gib = device.memory_bytes >> 30;
        write!(
            out,
            "device   {}: {}, {gib} GiB, compute capability {}",
            device.name, device.product, device.compute_capability
        )?;
        match device.unusable_because.as_str() {
            "" => writeln!(out)?,
            why => writeln!(out, ", not used: {why}")?,
        }
    }
    for why in &record.accelerators.missing {
        writeln!(out, "missing  {why}")?;
    }
    for engine in &record.engines {
        let state = if engine.absent_because.is_empty() { &engine.version } else { &engine.absent_because };
        writeln!(out, "engine   {} ({}): {state}", engine.name, engine.devices.join(", "))?;
    }
    Ok(())
}

fn figures(out: &mut String, record: &Record) -> fmt::Result {
    writeln!(out, "\n{:<28}{:>10}{:>10}", "GB/s", "up", "down")?;
    for one in &record.transfers {
        writeln!(out, "{:<28}{:>10.1}{:>10.1}", one.device, one.up_gb_s, one.down_gb_s)?;
    }
    writeln!(
        out,
        "\n{:<28}{:>10}{:>10}{:>10}{:>10}{:>10}{:>12}",
        "sgemm, TFLOP/s", "resident", "pinned", "direct", "unix", "shared", "max error"
    )?;
    for one in &record.sgemm {
        let bare = |tflops: Option<f64>| tflops.map_or("-".into(), |tflops| format!("{tflops:.3}"));
        let (resident, pinned) = (bare(one.resident_tflops), bare(one.pinned_tflops));
        let title = format!("{}, {} cubed", one.device, one.side);
        let (direct, unix, shared) = (one.direct_tflops, one.unix_tflops, one.shared_tflops);
        write!(out, "{title:<28}{resident:>10}{pinned:>10}{direct:>10.3}{unix:>10.3}{shared:>10.3}")?;
        writeln!(out, "{:>12.1e}", one.max_error)?;
    }
    writeln!(out, "\n{:<28}{:>10}{:>14}", "empty call, us", "", "after a pause")?;
    for one in &record.empty_calls {
        writeln!(out, "{:<28}{:>10.0}{:>14.0}", one.transport, one.us, one.after_pause_us)?;
    }
    writeln!(
        out,
        "\n{:<40}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>10}{:>12}",
        "network, ms",
        "direct",
        "unix",
        "added us",
        "awake",
        "added us",
        "shared",
        "added us",
        "images/s",
        "max error"
    )?;
    for one in &record.models {
        let title = format!("{} {} {}, batch {}", one.network, one.engine, one.device, one.batch);
        let error = one.max_error.map_or("-".into(), |error| format!("{error:.1e}"));
        write!(out, "{title:<40}{:>10.2}{:>10.2}{:>10.0}", one.direct_ms, one.unix_ms, one.unix_added_us)?;
        for way in [&one.awake, &one.shared] {
            match way {
                Some(way) => write!(out, "{:>10.2}{:>10.0}", way.ms, way.added_us)?,
                None => write!(out, "{:>10}{:>10}", "-", "-")?,
            }
        }
        writeln!(out, "{:>10.1}{error:>12}", one.images_per_s)?;
    }
    for one in &record.batching {
        writeln!(
            out,
            "\nbatching, {} callers of one image each, {} on {} {}: {:.1} calls/s with, {:.1} without, {:.2} x",
            one.callers,
            one.network,
            one.engine,
            one.device,
            one.on_calls_per_s,
            one.off_calls_per_s,
            one.on_calls_per_s / one.off_calls_per_s
        )?;
    }
    Ok(())
}

fn judged(out: &mut String, record: &Record) -> fmt::Result {
    writeln!(out)?;
    for check in &record.checks {
        let state = if check.passed { "ok  " } else { "FAIL" };
        writeln!(out, "{state}     {}: {}, expected {}", check.what, check.found, check.expected)?;
    }
    for goal in &record.goals {
        let state = if goal.met { "met " } else { "not " };
        writeln!(out, "{state}     {} {:.3}: {:.3}", goal.what, goal.goal, goal.found)?;
    }
    Ok(())
}
