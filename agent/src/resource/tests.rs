//! The store in one process. What a killed agent leaves is in `tests/it/store.rs`.

use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use vaccel_proto::Reason;
use vaccel_proto::error::Detail;

use super::*;
use crate::config::{StoreSync, TenantLimits};
use crate::quota::Accounts;
use crate::scheduler::Cancel;

const CONTENT: &[u8] = b"the content of a file";

/// What a tenant may store here, in bytes.
const QUOTA: u64 = 64;

/// A store in a folder of its own, as one agent after the other uses it.
struct Setting {
    store: Store,
    tenant: Tenant,
    account: Arc<Account>,
    folder: tempfile::TempDir,
}

fn config(folder: &Path, sync: StoreSync, bytes_max: u64) -> StoreConfig {
    StoreConfig { folder: folder.into(), sync, bytes_max }
}

fn account(tenant: &Tenant, resource_bytes: u64) -> Arc<Account> {
    let limits = TenantLimits {
        connections: 1,
        sessions: 9,
        calls: 1,
        resource_bytes,
        in_flight_bytes: 1,
        shared_bytes: 1,
        device_bytes: 0,
    };
    Accounts::new(limits, |_| 1).of(tenant)
}

impl Setting {
    fn new() -> Self {
        Self::limited(u64::MAX, QUOTA)
    }

    fn limited(bytes_max: u64, quota: u64) -> Self {
        let folder = tempfile::tempdir().expect("a folder");
        let store = Store::open(&config(folder.path(), StoreSync::Always, bytes_max), quota).expect("opens");
        let tenant = Tenant::new("a");
        let account = account(&tenant, quota);
        Self { store, tenant, account, folder }
    }

    /// The next agent.
    fn again(self) -> Self {
        let Self { store, tenant, account, folder } = self;
        drop(store);
        let store = Store::open(&config(folder.path(), StoreSync::Rename, u64::MAX), QUOTA).expect("free");
        drop(account);
        Self { account: self::account(&tenant, QUOTA), store, tenant, folder }
    }

    async fn put(&self, holdings: &Arc<Holdings>, offset: u64, data: &[u8]) -> Result<u64, Error> {
        self.put_as(holdings, CONTENT, offset, data).await
    }

    /// Uploads `data` as a part of `content`.
    async fn put_as(
        &self,
        holdings: &Arc<Holdings>,
        content: &[u8],
        offset: u64,
        data: &[u8],
    ) -> Result<u64, Error> {
        let begin = UploadBegin { hash: hash(content), size: content.len() as u64, offset };
        let mut uploading = self.store.upload(&self.tenant, holdings, &self.account, begin).await?;
        uploading.append(Bytes::copy_from_slice(data)).await?;
        uploading.finish().await
    }

    async fn register(&self, holdings: &Arc<Holdings>, files: Vec<File>) -> Result<Registered, Error> {
        let kind = ResourceKind::Data.into();
        self.store.register(&self.tenant, holdings, &self.account, kind, files).await
    }

    /// What is missing of a file.
    async fn missing(&self, holdings: &Arc<Holdings>, content: &[u8]) -> Option<u64> {
        let registered = self.register(holdings, vec![file("f", content)]).await.expect("valid");
        registered.missing.first().map(|missing| missing.offset)
    }

    async fn cached(&self) -> u64 {
        self.store.cached_bytes(&self.tenant).await.expect("read")
    }

    fn used(&self) -> u64 {
        self.account.used(Unit::ResourceBytes)
    }

    fn room(&self) -> PathBuf {
        self.folder.path().join("v1").join(Disk::name(&self.tenant))
    }

    fn path(&self, content: &[u8]) -> PathBuf {
        self.room().join("complete").join(hash(content).to_string())
    }

    fn part(&self, content: &[u8]) -> PathBuf {
        self.room().join("partial").join(format!("{}.{}", hash(content), content.len()))
    }
}

fn hash(content: &[u8]) -> Hash {
    Hash(Sha256::digest(content).into())
}

fn file(name: &str, content: &[u8]) -> File {
    let sha256 = Bytes::copy_from_slice(&Sha256::digest(content));
    File { name: name.into(), size: content.len() as u64, sha256 }
}

fn holdings() -> Arc<Holdings> {
    Arc::default()
}

#[tokio::test]
async fn an_upload_goes_on_where_it_stopped_and_is_shared() {
    let setting = Setting::new();
    let (first, second) = (holdings(), holdings());
    assert_eq!(setting.missing(&first, CONTENT).await, Some(0));
    assert_eq!(setting.put(&first, 0, &CONTENT[..4]).await.expect("part"), 4);
    assert_eq!(setting.missing(&first, CONTENT).await, Some(4));
    assert_eq!(
        setting.missing(&second, CONTENT).await,
        Some(4),
        "the tenant's other session goes on with it"
    );
    let refusal = setting.put(&first, 5, &CONTENT[5..]).await.expect_err("a gap");
    assert_eq!(refusal.message(), "offset: expected 4, got 5");
    // What is there already is skipped.
    assert_eq!(setting.put(&second, 2, &CONTENT[2..9]).await.expect("more"), 9);
    assert_eq!(setting.put(&first, 0, &CONTENT[..3]).await.expect("nothing new"), 9);
    assert_eq!(setting.put(&first, 9, &CONTENT[9..]).await.expect("rest"), CONTENT.len() as u64);
    let registered = setting.register(&first, vec![file("f", CONTENT)]).await.expect("valid");
    assert!(registered.missing.is_empty());
    assert_eq!(setting.missing(&second, CONTENT).await, None, "a second session needs no upload");
    first.unregister(&registered.id, false).expect("held");
    let resource = second.resource(&registered.id).expect("the second session still holds it");
    assert_eq!(setting.used(), CONTENT.len() as u64);
    assert_eq!(&resource.files[0].1.load(&Cancel::default()).expect("read")[..], CONTENT);
    drop((first, second, resource));
    assert_eq!((setting.used(), setting.cached().await), (0, CONTENT.len() as u64));
    assert_eq!(setting.missing(&holdings(), CONTENT).await, None, "it stays as a cache");
    let mode = |path: PathBuf| path.metadata().expect("there").permissions().mode() & 0o777;
    assert_eq!((mode(setting.path(CONTENT)), mode(setting.room())), (0o400, 0o700));
}

#[tokio::test]
async fn wrong_content_is_refused_and_begins_anew() {
    let setting = Setting::new();
    let holdings = holdings();
    let wrong = vec![b'x'; CONTENT.len()];
    let refusal = setting.put(&holdings, 0, &wrong).await.expect_err("not its hash");
    assert_eq!(refusal.reason(), Reason::BadArgument);
    assert_eq!((setting.used(), setting.part(CONTENT).exists()), (0, false));
    let long = [CONTENT, b"!"].concat();
    assert!(setting.put(&holdings, 0, &long).await.is_err());
    setting.put(&holdings, 0, CONTENT).await.expect("right content");
    assert_eq!(std::fs::read_dir(setting.room().join("partial")).expect("a folder").count(), 0);
}

#[tokio::test]
async fn what_was_stored_outlives_the_agent() {
    let setting = Setting::new();
    let first = holdings();
    setting.put(&first, 0, CONTENT).await.expect("whole");
    setting.put_as(&first, b"another one", 0, b"anoth").await.expect("part");
    let setting = setting.again();
    let second = holdings();
    assert_eq!(setting.missing(&second, CONTENT).await, None);
    assert_eq!(setting.missing(&second, b"another one").await, Some(5));
    setting.put_as(&second, b"another one", 5, b"er one").await.expect("the rest");
    assert_eq!(setting.missing(&second, b"another one").await, None);

    // What a machine's end made of a part is found out, and the guest gets another chance.
    setting.put_as(&second, b"a third", 0, b"a ").await.expect("part");
    let setting = setting.again();
    std::fs::write(setting.part(b"a third"), b"\0\0\0").expect("the agent's own");
    let third = holdings();
    let refusal = setting.put_as(&third, b"a third", 3, b"hird").await.expect_err("damaged");
    assert_eq!(refusal.reason(), Reason::Overloaded, "{refusal:?}");
    setting.put_as(&third, b"a third", 0, b"a third").await.expect("anew");
    let refusal = setting.put_as(&third, b"a fourth", 0, b"is a lie").await.expect_err("its own fault");
    assert_eq!(refusal.reason(), Reason::BadArgument);
}

#[tokio::test]
async fn a_store_that_keeps_nothing_is_empty_at_the_next_start() {
    let setting = Setting::new();
    setting.put(&holdings(), 0, CONTENT).await.expect("whole");
    let Setting { store, folder, tenant, account } = setting;
    let config = config(folder.path(), StoreSync::Never, u64::MAX);
    let refusal = Store::open(&config, QUOTA).expect_err("in use");
    assert!(refusal.to_string().contains(&std::process::id().to_string()), "{refusal}");
    drop(store);
    let store = Store::open(&config, QUOTA).expect("free");
    let setting = Setting { store, folder, tenant, account };
    assert_eq!(setting.missing(&holdings(), CONTENT).await, Some(0));
    setting.store.survey().await;
    let names = std::fs::read_dir(setting.folder.path()).expect("a folder");
    let mut names: Vec<_> = names.map(|entry| entry.expect("read").file_name()).collect();
    names.sort();
    assert_eq!(names, ["lock", "v1"]);
}

#[tokio::test]
async fn a_folder_that_others_made_is_refused() {
    let folder = tempfile::tempdir().expect("a folder");
    let config = config(folder.path(), StoreSync::Rename, u64::MAX);
    symlink("/tmp", folder.path().join("v1")).expect("made");
    let refusal = Store::open(&config, QUOTA).expect_err("leads elsewhere");
    assert!(refusal.to_string().contains("--store"), "{refusal}");
}

#[tokio::test]
async fn quota_is_taken_from_the_declared_size() {
    let setting = Setting::new();
    let holdings = holdings();
    for (size, offset, reason) in [(QUOTA + 1, 0, Reason::QuotaExceeded), (9, 1, Reason::BadArgument)] {
        let begin = UploadBegin { hash: Hash([0; 32]), size, offset };
        let refusal = setting.store.upload(&setting.tenant, &holdings, &setting.account, begin).await;
        assert_eq!(refusal.err().expect("refused").reason(), reason);
    }
    assert_eq!(holdings.uploads(), 0, "a refusal leaves nothing behind");
    assert_eq!(setting.used() + setting.account.used(Unit::Objects), 0);
    assert!(!setting.room().exists());
}

#[tokio::test]
async fn what_nobody_holds_gives_way_the_longest_unused_first() {
    let setting = Setting::new();
    let contents = [[b'a'; 20], [b'b'; 20], [b'c'; 20]];
    let keeper = holdings();
    for (content, holdings) in contents.iter().zip([&holdings(), &holdings(), &keeper]) {
        setting.put_as(holdings, content, 0, content).await.expect("fits");
    }
    assert_eq!((setting.used(), setting.cached().await), (20, 40));
    // Used again, so that the second one is the oldest.
    let late = SystemTime::now() + Duration::from_secs(5);
    let opened = std::fs::File::open(setting.path(&contents[0])).expect("there");
    opened.set_modified(late).expect("the agent's own");
    let fresh = setting.again();
    let [old, keeper] = [holdings(), holdings()];
    assert_eq!(fresh.missing(&keeper, &contents[2]).await, None);
    fresh.put_as(&old, &[b'd'; 20], 0, &[b'd'; 20]).await.expect("something gives way");
    let there = contents.map(|content| fresh.path(&content).exists());
    assert_eq!(there, [true, false, true]);
    let refusal = fresh.put_as(&old, &[b'e'; 30], 0, b"").await.expect_err("the rest is held");
    let figures = Detail::Limit {
        subject: "stored files of this tenant".into(),
        limit: QUOTA,
        used: 70,
        unit: "bytes".into(),
    };
    assert_eq!((refusal.reason(), refusal.detail()), (Reason::QuotaExceeded, &figures));
    assert!(fresh.path(&contents[0]).exists(), "a refusal costs nothing");
}

#[tokio::test]
async fn the_stores_limit_takes_from_caches_and_never_from_what_is_held() {
    // Room for three files.
    let setting = Setting::limited(3 * 4096, QUOTA);
    let other = Tenant::new("b");
    let others_account = account(&other, QUOTA);
    let others = holdings();
    let put = async |content: &[u8], holdings: &Arc<Holdings>| {
        let begin = UploadBegin { hash: hash(content), size: content.len() as u64, offset: 0 };
        let mut uploading = setting.store.upload(&other, holdings, &others_account, begin).await?;
        uploading.append(Bytes::copy_from_slice(content)).await?;
        uploading.finish().await
    };
    put(b"held by another", &others).await.expect("fits");
    put(b"cached of another", &holdings()).await.expect("fits");
    setting.put_as(&holdings(), b"cached", 0, b"cached").await.expect("fits");
    // The own cache goes first, the other's then.
    let own = holdings();
    setting.put_as(&own, b"one", 0, b"one").await.expect("own cache");
    assert!(!setting.path(b"cached").exists());
    setting.put_as(&own, b"two", 0, b"two").await.expect("the other's cache");
    let refusal = setting.put_as(&own, b"three", 0, b"three").await.expect_err("all is held");
    assert_eq!((refusal.reason(), refusal.detail()), (Reason::QuotaExceeded, &Detail::None));
    assert_eq!(setting.used(), 6, "a refusal takes nothing");
    put(b"held by another", &others).await.expect("still there");
    drop(own);
    setting.put_as(&holdings(), b"three", 0, b"three").await.expect("let go of");
}

#[tokio::test]
async fn what_is_too_old_goes_and_what_is_held_stays() {
    let setting = Setting::new();
    let keeper = holdings();
    setting.put_as(&keeper, b"held", 0, b"held").await.expect("fits");
    setting.put_as(&keeper, b"cached", 0, b"cached").await.expect("fits");
    setting.put_as(&keeper, b"begun", 0, b"beg").await.expect("fits");
    setting.put_as(&keeper, b"just begun", 0, b"just").await.expect("fits");
    let age = |path: PathBuf, days: u64| {
        let file = std::fs::File::open(path).expect("there");
        let then = SystemTime::now() - Duration::from_secs(days * 24 * 3600);
        file.set_modified(then).expect("the agent's own");
    };
    age(setting.path(b"held"), 100);
    age(setting.path(b"cached"), 31);
    age(setting.part(b"begun"), 2);
    let setting = setting.again();
    let keeper = holdings();
    assert_eq!(setting.missing(&keeper, b"held").await, None);
    setting.store.sweep().await;
    assert!(setting.path(b"held").exists() && setting.part(b"just begun").exists());
    assert!(!setting.path(b"cached").exists() && !setting.part(b"begun").exists());
    let used = setting.path(b"held").metadata().and_then(|file| file.modified()).expect("there");
    assert!(used.elapsed().expect("in the past") < Duration::from_secs(3600), "its use is written down");
}

#[tokio::test]
async fn a_tenant_that_has_nothing_is_forgotten() {
    let setting = Setting::new();
    assert_eq!(setting.cached().await, 0);
    setting.put(&holdings(), 0, b"").await.expect("begun");
    setting.store.sweep().await;
    assert_eq!(setting.store.shelves().len(), 1);
    std::fs::remove_file(setting.part(CONTENT)).expect("the agent's own");
    let setting = setting.again();
    assert_eq!(setting.cached().await, 0);
    setting.store.sweep().await;
    assert!(setting.store.shelves().is_empty() && !setting.room().exists());
}

#[tokio::test]
async fn a_damaged_file_is_never_served_and_can_be_uploaded_again() {
    let setting = Setting::new();
    let damages: [fn(&Path); 5] = [
        |path| std::fs::write(path, vec![b'x'; CONTENT.len()]).expect("written"),
        |path| std::fs::write(path, b"").expect("written"),
        |path| std::fs::remove_file(path).expect("removed"),
        |path| {
            std::fs::remove_file(path).expect("removed");
            symlink("/etc/hostname", path).expect("made");
        },
        |path| std::fs::hard_link(path, path.with_file_name("second name")).expect("made"),
    ];
    for damage in damages {
        let holdings = holdings();
        setting.put(&holdings, 0, CONTENT).await.expect("whole");
        let registered = setting.register(&holdings, vec![file("f", CONTENT)]).await.expect("valid");
        let path = setting.path(CONTENT);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("the agent's own");
        damage(&path);
        let resource = holdings.resource(&registered.id).expect("held");
        let begin = || ReadBegin { file: String::new(), offset: 0, length: 0 };
        let refusals = [
            resource.read(begin()).await.map(drop).expect_err("damaged"),
            resource.files[0].1.load(&Cancel::default()).map(drop).expect_err("damaged"),
        ];
        for refusal in refusals {
            assert_eq!(refusal.reason(), Reason::NotFound, "{refusal:?}");
            assert!(!refusal.message().contains(setting.folder.path().to_str().expect("text")));
        }
        let _ = std::fs::remove_file(path.with_file_name("second name"));
        assert_eq!(setting.missing(&holdings, CONTENT).await, Some(0));
        setting.put(&holdings, 0, CONTENT).await.expect("again");
        let registered = setting.register(&holdings, vec![file("f", CONTENT)]).await.expect("valid");
        let resource = holdings.resource(&registered.id).expect("held");
        assert_eq!(
            resource.read(begin()).await.expect("whole").next().await.expect("read").expect("some"),
            CONTENT
        );
        assert_eq!(resource.files[0].1.load(&Cancel::default()).expect("whole"), CONTENT);
    }
}

#[tokio::test]
async fn a_size_that_does_not_fit_is_the_guests_fault_or_the_disks() {
    let setting = Setting::new();
    setting.put(&holdings(), 0, CONTENT).await.expect("whole");
    let setting = setting.again();
    let lie = File { size: 5, ..file("f", CONTENT) };
    let refusal = setting.register(&holdings(), vec![lie.clone()]).await.expect_err("a lie");
    assert_eq!(refusal.message(), "files[0].size: expected the 21 bytes this file has, got 5");
    // After a power cut, say.
    let setting = setting.again();
    let path = setting.path(CONTENT);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).expect("the agent's own");
    std::fs::write(&path, b"").expect("the agent's own");
    assert_eq!(setting.missing(&holdings(), CONTENT).await, Some(0), "an honest guest uploads it again");
}

#[tokio::test]
async fn what_was_planted_in_the_store_is_not_followed() {
    let setting = Setting::new();
    let target = setting.folder.path().join("target");
    std::fs::write(&target, CONTENT).expect("written");
    for folder in ["complete", "partial"] {
        std::fs::create_dir_all(setting.room().join(folder)).expect("made");
    }
    symlink(&target, setting.path(CONTENT)).expect("made");
    symlink(&target, setting.part(CONTENT)).expect("made");
    assert_eq!(setting.missing(&holdings(), CONTENT).await, Some(0), "even with the right content");
    setting.put(&holdings(), 0, CONTENT).await.expect("in its own file");
    assert_eq!(std::fs::read(&target).expect("there"), CONTENT);
    assert!(setting.path(CONTENT).symlink_metadata().expect("there").is_file());
    // Nor is a folder that leads elsewhere.
    let elsewhere = tempfile::tempdir().expect("a folder");
    let room = setting.room();
    std::fs::rename(&room, elsewhere.path().join("room")).expect("moved");
    symlink(elsewhere.path().join("room"), &room).expect("made");
    let setting = setting.again();
    assert_eq!(setting.missing(&holdings(), CONTENT).await, Some(0));
    let refusal = setting.put(&holdings(), 0, CONTENT).await.expect_err("nowhere to go");
    assert_eq!(refusal.reason(), Reason::BackendFailed, "{refusal:?}");
    std::fs::remove_file(&room).expect("removed");
    setting.put(&holdings(), 0, CONTENT).await.expect("in its own folder");
    // A second name would let somebody else change it, or us somebody else's.
    let content = b"with a second name";
    std::fs::hard_link(&target, setting.part(content)).expect("made");
    let setting = setting.again();
    setting.put_as(&holdings(), content, 0, content).await.expect("in its own file");
    assert_eq!(std::fs::read(&target).expect("there"), CONTENT);
}

#[tokio::test]
async fn a_resource_is_held_as_often_as_it_was_registered() {
    let setting = Setting::new();
    let holdings = holdings();
    setting.put(&holdings, 0, CONTENT).await.expect("whole");
    let register = async || setting.register(&holdings, vec![file("f", CONTENT)]).await.expect("valid").id;
    let id = register().await;
    assert_eq!(register().await, id);
    assert_eq!(holdings.list().len(), 1);
    holdings.unregister(&id, false).expect("twice");
    holdings.resource(&id).expect("once");
    holdings.unregister(&id, false).expect("once");
    assert_eq!(holdings.unregister(&id, false).expect_err("never").reason(), Reason::NotFound);
    let id = [register().await, register().await].concat()[..64].to_owned();
    holdings.unregister(&id, true).expect("for good");
    assert!(holdings.resource(&id).is_err());
    assert_eq!(setting.used(), 0);
}

#[tokio::test]
async fn resources_over_the_same_bytes_are_counted() {
    let setting = Setting::new();
    let holdings = holdings();
    setting.put(&holdings, 0, CONTENT).await.expect("fits");
    // Each name makes another resource of the one file.
    let mut number = 0;
    let refused = loop {
        let named = file(&format!("f{number}"), CONTENT);
        if let Err(refused) = setting.register(&holdings, vec![named]).await {
            break refused;
        }
        number += 1;
    };
    assert_eq!(refused.reason(), Reason::QuotaExceeded);
    let held = holdings.list();
    holdings.unregister(&held[0].id, false).expect("held");
    drop(held);
    setting.register(&holdings, vec![file("another", CONTENT)]).await.expect("one was given back");
}

#[tokio::test]
async fn names_are_labels_and_never_paths() {
    for name in ["", "/etc/passwd", "../x", "a/../b", "a//b", "./a", "a/", "a\\b", "a\0b", "a\nb"] {
        assert!(!is_label(name), "{name:?}");
    }
    assert!(is_label("model.onnx") && is_label("weights/part-1.bin"));
    let setting = Setting::new();
    let twice = vec![file("f", CONTENT), file("f", CONTENT)];
    assert!(setting.register(&holdings(), twice).await.is_err());
}
