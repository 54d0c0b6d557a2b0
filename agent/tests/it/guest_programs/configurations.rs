//! The files of `examples/` for microVMs and unikernels: what this machine can run of their commands is run, and what
//! they say to each other fits together.

use std::path::Path;
use std::process::Command;

use serde_json::Value;
use vaccel_guest::Address;

use super::{command, succeed};
use crate::support::{Agent, repository};

/// What is run here of the commands in READMEs; the others need a hypervisor, or change this machine.
const RUN: &[&str] = &["make ", "mkdir ", "cp ", "mv ", "cargo build ", "cargo run ", "target/"];
const NOT_RUN: &[&str] = &["vsock://", "/run/", " install", "-Zbuild-std"];

fn example(path: &str) -> String {
    let path = repository().join("examples").join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn json(path: &str) -> Value {
    serde_json::from_str(&example(path)).unwrap()
}

/// The commands that an example's README shows, each with what it shows of their output.
fn commands(example_name: &str) -> Vec<(String, String)> {
    let text = example(&format!("{example_name}/README.md"));
    let blocks = text.split("```console\n").skip(1).map(|block| block.split("```").next().unwrap());
    let mut commands: Vec<(String, String)> = Vec::new();
    for line in blocks.flat_map(|block| block.lines().chain([""])) {
        if let Some(command) = line.strip_prefix("$ ") {
            commands.push((command.to_owned(), String::new()));
        } else if let Some((command, _)) = commands.last_mut().filter(|(command, _)| command.ends_with('\\'))
        {
            command.truncate(command.len() - 1);
            command.push_str(line.trim());
        } else if !line.is_empty() {
            commands.last_mut().unwrap().1.push_str(&format!("{line}\n"));
        }
    }
    commands
}

/// Runs what can be run of a README, with an agent for the guests; returns how many commands that were.
fn follow(example_name: &str, address: &str) -> usize {
    let commands = commands(example_name);
    let can_run = |text: &str| {
        RUN.iter().any(|start| text.starts_with(start)) && !NOT_RUN.iter().any(|word| text.contains(word))
    };
    let commands = commands.iter().filter(|(text, _)| can_run(text));
    let mut count = 0;
    for (text, shown) in commands {
        let mut shell = Command::new("sh");
        shell.args(["-ec", text]).current_dir(repository()).env("VACCEL_RPC_ADDRESS", address);
        let printed = succeed(&shell.output().unwrap());
        assert!(shown.is_empty() || printed == *shown, "{text}\n{printed}");
        count += 1;
    }
    count
}

/// The words behind `vaccel-agent` in every command that starts one.
fn agents(example_name: &str) -> Vec<Vec<String>> {
    let commands = commands(example_name);
    let parts = commands.iter().flat_map(|(text, _)| text.split(" && "));
    let words = parts.filter_map(|part| part.strip_prefix("vaccel-agent"));
    words.map(|words| words.split_whitespace().map(str::to_owned).collect()).collect()
}

/// The port at the end of an address, which a guest can dial.
fn port(address: &str) -> u32 {
    address.parse::<Address>().unwrap_or_else(|error| panic!("{address}: {error}"));
    address.rsplit_once(':').unwrap().1.parse().unwrap()
}

/// The address on the command line of a kernel, and that what is behind it names the image.
fn address_of_cmdline(cmdline: &str) -> &str {
    let mut words = cmdline.split(' ').skip_while(|word| !word.starts_with("VACCEL_RPC_ADDRESS="));
    let address = words.next().unwrap().split_once('=').unwrap().1;
    // The kernel takes words with a dot for settings of modules.
    assert_eq!(words.collect::<Vec<_>>(), ["/image"]);
    address
}

#[test]
fn the_commands_in_the_readmes_of_guests_do_what_they_show() {
    if cfg!(not(target_arch = "x86_64")) {
        // They name that architecture.
        return;
    }
    let agent = Agent::unix(&[]);
    let image = repository().join("examples/images/digit-000-is-2.png");
    let counts = ["guest-c", "guest-rust", "unikraft", "nanos", "firecracker"]
        .map(|name| follow(name, agent.address()));
    assert_eq!(counts, [2, 2, 5, 3, 4]);
    // What would be started in the machine runs on this one.
    let programs = ["unikraft/guest-rust", "nanos/classify", "firecracker/root/init"];
    for program in programs.map(|name| repository().join("target").join(name)) {
        let printed = succeed(&command(&program).arg(agent.address()).arg(&image).output().unwrap());
        assert!(printed.ends_with(": two 1.0000\n"), "{}: {printed}", program.display());
        let segments = Command::new("readelf").arg("--segments").arg(&program).output().unwrap();
        let segments = succeed(&segments);
        assert!(!segments.contains("INTERP"), "{} needs no other file", program.display());
        let must_move = program.ends_with("guest-rust");
        assert!(!must_move || segments.contains("DYN"), "Unikraft chooses where a program lies");
    }
}

#[test]
fn the_agents_in_the_readmes_of_guests_can_start() {
    for name in ["unikraft", "nanos", "firecracker", "cloud-hypervisor"] {
        let agents = agents(name);
        assert!(!agents.is_empty(), "{name} starts no agent");
        for words in agents {
            let mut agent = command(Path::new(env!("CARGO_BIN_EXE_vaccel-agent")));
            succeed(&agent.arg("check-config").args(words).output().unwrap());
        }
    }
}

#[test]
fn microvms_dial_the_port_that_their_agent_has() {
    let firecracker = json("firecracker/machine.json");
    let cloud_hypervisor = json("cloud-hypervisor/machine.json");
    let machines = [
        (
            "firecracker",
            &firecracker["boot-source"]["boot_args"],
            &firecracker["vsock"]["uds_path"],
            &firecracker["vsock"]["guest_cid"],
        ),
        (
            "cloud-hypervisor",
            &cloud_hypervisor["payload"]["cmdline"],
            &cloud_hypervisor["vsock"]["socket"],
            &cloud_hypervisor["vsock"]["cid"],
        ),
    ];
    for (name, cmdline, socket, cid) in machines {
        let port = port(address_of_cmdline(cmdline.as_str().unwrap()));
        let listens = format!("hvsock://{}:{port}", socket.as_str().unwrap());
        assert_eq!(agents(name), [["--address".to_owned(), listens]]);
        assert!(cid.as_u64().unwrap() > 2, "{name}: the first CIDs are taken");
    }
    let [kernel, initramfs] = ["kernel", "initramfs"].map(|key| &cloud_hypervisor["payload"][key]);
    assert_eq!(
        [kernel, initramfs],
        [&firecracker["boot-source"]["kernel_image_path"], &firecracker["boot-source"]["initrd_path"]]
    );
    let by_hand = &commands("cloud-hypervisor")[1].0;
    assert!(by_hand.contains(&format!("--cmdline {}", cloud_hypervisor["payload"]["cmdline"])), "{by_hand}");
    assert!(by_hand.contains("--vsock cid=3,socket=vm1.vsock") && by_hand.contains("--memory size=128M"));
    assert_eq!(cloud_hypervisor["memory"]["size"], 128 << 20);
}

#[test]
fn unikernels_have_the_files_they_name() {
    let kraftfile = example("unikraft/Kraftfile");
    let cmd = kraftfile.lines().find_map(|line| line.strip_prefix("cmd: ")).unwrap();
    let cmd: Vec<String> = serde_json::from_str(cmd).unwrap();
    let dockerfile = example("unikraft/Dockerfile");
    let copies = dockerfile.lines().filter_map(|line| line.strip_prefix("COPY ")?.split_once(' '));
    let (sources, places): (Vec<&str>, Vec<&str>) = copies.unzip();
    assert_eq!(places, [&cmd[0], &cmd[2]]);
    let files = commands("unikraft").iter().map(|(text, _)| text.clone()).collect::<String>();
    assert!(sources.iter().all(|source| files.contains(source)), "{sources:?}");
    assert_eq!(agents("unikraft")[0][1], cmd[1]);
    assert_eq!(port(&cmd[1]), 65500);

    let config = json("nanos/config.json");
    let file = config["Files"][0].as_str().unwrap();
    assert_eq!(config["Args"][0], format!("/{file}"));
    assert_eq!(port(config["Env"]["VACCEL_RPC_ADDRESS"].as_str().unwrap()), 65500);

    let manifest: toml::Value = toml::from_str(&example("hermit/Cargo.toml")).unwrap();
    let library = manifest["dependencies"]["vaccel-guest"]["path"].as_str().unwrap();
    assert!(repository().join("examples/hermit").join(library).join("Cargo.toml").is_file());
    let name = manifest["package"]["name"].as_str().unwrap();
    assert!(commands("hermit").iter().any(|(text, _)| text.contains(&format!("/release/{name}"))));
    let program = example("hermit/src/main.rs");
    assert!(program.contains("\"tcp://10.0.2.2:65500\""), "the host of QEMU's own network");
}

#[test]
fn the_library_is_installed_with_all_that_a_program_needs() {
    let folder = tempfile::tempdir().unwrap();
    let mut make = Command::new("make");
    make.args(["-C", "examples/guest-c", "install", "--no-print-directory"]).current_dir(repository());
    let prefix = folder.path().join("prefix");
    succeed(&make.arg(format!("PREFIX={}", prefix.display())).output().unwrap());
    let script = "cc -std=c99 examples/guest-c/classify.c $(pkg-config --cflags --libs vaccel-guest) -o $1";
    let mut shell = Command::new("sh");
    shell.args(["-ec", script, "sh"]).arg(folder.path().join("classify")).current_dir(repository());
    succeed(&shell.env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig")).output().unwrap());
    let mut version = Command::new("pkg-config");
    version.args(["--modversion", "vaccel-guest"]).env("PKG_CONFIG_PATH", prefix.join("lib/pkgconfig"));
    assert_eq!(succeed(&version.output().unwrap()).trim(), env!("CARGO_PKG_VERSION"));
    let agent = Agent::unix(&[]);
    let image = repository().join("examples/images/digit-000-is-2.png");
    let mut installed = command(&folder.path().join("classify"));
    installed.env("LD_LIBRARY_PATH", prefix.join("lib")).arg(agent.address()).arg(image);
    assert!(succeed(&installed.output().unwrap()).ends_with(": two 1.0000\n"));
}
