//! The policy against the double, with pauses of a millisecond.

use super::super::double::{Double, Fault};
use super::*;

fn hasty(double: Arc<Double>, patience: Duration) -> Arc<Patient> {
    let policy = Policy { patience, first: Duration::from_millis(1), longest: Duration::from_millis(1) };
    Arc::new(Patient { inner: double, policy })
}

fn pair() -> (Arc<Double>, Arc<Patient>) {
    let double = Double::new();
    (double.clone(), hasty(double, Duration::from_secs(60)))
}

fn bytes(text: &'static str) -> Payload {
    Payload::Bytes(text.into())
}

fn about(mtime: &str) -> Metadata {
    Metadata { content_type: None, user: [("mtime".to_owned(), mtime.to_owned())].into() }
}

#[tokio::test]
async fn what_goes_away_is_tried_until_it_works() {
    let (double, patient) = pair();
    double.put_raw("a", "1", Metadata::default());
    double.order("head", 0, 5, Fault::Fails(StoreErrorKind::Unavailable));
    assert_eq!(patient.head("a").await.unwrap().size, 1);
    assert_eq!(double.count("head"), 6);
}

#[tokio::test]
async fn patience_ends() {
    let double = Double::new();
    let patience = Duration::from_millis(50);
    double.fail("head", StoreErrorKind::Unavailable);
    let began = Instant::now();
    let error = hasty(double.clone(), patience).head("a").await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::Unavailable);
    assert!(began.elapsed() >= patience && double.count("head") > 1);
}

#[tokio::test]
async fn an_answer_is_final() {
    use StoreErrorKind::*;
    for kind in [NotFound, NoBucket, Conflict, Denied, Invalid, Unsupported, Local] {
        let (double, patient) = pair();
        double.fail("put", kind);
        let error = patient.put("a", bytes("1"), &Metadata::default(), &Condition::None).await.unwrap_err();
        assert_eq!((error.kind, double.count("put")), (kind, 1));
    }
}

#[tokio::test]
async fn a_create_whose_answer_was_lost_is_known_again() {
    let (double, patient) = pair();
    double.order("put", 0, 1, Fault::AnswerLost);
    let etag = patient.put("a", bytes("1"), &about("1.5"), &Condition::Absent).await.unwrap();
    assert_eq!(double.etag("a"), Some(etag));
    assert_eq!(double.count("put"), 2);
}

#[tokio::test]
async fn a_replacement_whose_answer_was_lost_is_known_again() {
    let (double, patient) = pair();
    let old = double.put_raw("a", "old", Metadata::default());
    double.order("put", 0, 1, Fault::AnswerLost);
    patient.put("a", bytes("new"), &about("2"), &Condition::Is(old)).await.unwrap();
    assert_eq!(double.object("a").unwrap().0, "new");
}

#[tokio::test]
async fn what_somebody_else_wrote_is_not_taken_for_ours() {
    // The attempt never arrived, and somebody else was there before the next one.
    for (theirs, metadata) in [("2", about("1.5")), ("1", about("1.6")), ("longer", about("1.5"))] {
        let (double, patient) = pair();
        double.fail_nth("put", 1, StoreErrorKind::Unavailable);
        double.put_raw("a", theirs, metadata);
        let error = patient.put("a", bytes("1"), &about("1.5"), &Condition::Absent).await.unwrap_err();
        assert_eq!(error.kind, StoreErrorKind::Conflict);
        assert_eq!(double.object("a").unwrap().0, theirs);
    }
}

#[tokio::test]
async fn a_conflict_without_a_lost_answer_is_one_even_with_the_same_bytes() {
    let (double, patient) = pair();
    double.put_raw("a", "1", about("1.5"));
    let error = patient.put("a", bytes("1"), &about("1.5"), &Condition::Absent).await.unwrap_err();
    assert_eq!((error.kind, double.count("head")), (StoreErrorKind::Conflict, 0));
}

#[tokio::test]
async fn an_upload_whose_finish_was_lost_is_known_again() {
    for condition in [Condition::None, Condition::Absent] {
        let (double, patient) = pair();
        let upload = patient.begin_upload("a", &Metadata::default()).await.unwrap();
        let first = Payload::Bytes(vec![7; 5 << 20].into());
        let parts = [
            patient.upload_part("a", &upload, 1, first).await.unwrap(),
            patient.upload_part("a", &upload, 2, bytes("end")).await.unwrap(),
        ];
        double.order("finish_upload", 0, 1, Fault::AnswerLost);
        let etag = patient.finish_upload("a", &upload, &parts, &condition).await.unwrap();
        assert_eq!(double.etag("a"), Some(etag));
    }
}

#[tokio::test]
async fn an_upload_that_is_gone_is_not_taken_for_finished() {
    let (double, patient) = pair();
    let upload = patient.begin_upload("a", &Metadata::default()).await.unwrap();
    let part = patient.upload_part("a", &upload, 1, bytes("end")).await.unwrap();
    double.put_raw("a", "theirs", Metadata::default());
    double.abort_upload("a", &upload).await.unwrap();
    double.fail_nth("finish_upload", 1, StoreErrorKind::Unavailable);
    let error = patient.finish_upload("a", &upload, &[part], &Condition::None).await.unwrap_err();
    assert_eq!(error.kind, StoreErrorKind::NotFound);
}

#[tokio::test]
async fn a_copy_whose_answer_was_lost_is_known_again() {
    let (double, patient) = pair();
    double.put_raw("a", "1", about("1"));
    double.order("copy", 0, 1, Fault::AnswerLost);
    patient.copy("a", None, "b", None, &Condition::Absent).await.unwrap();
    double.order("copy", 0, 1, Fault::AnswerLost);
    let version = double.etag("b").unwrap();
    patient.copy("b", Some(&version), "b", Some(&about("2")), &Condition::None).await.unwrap();
    assert_eq!(double.object("b").unwrap().1, about("2"));
}

#[tokio::test]
async fn a_delete_whose_answer_was_lost_succeeds() {
    let (double, patient) = pair();
    let etag = double.put_raw("a", "1", Metadata::default());
    double.order("delete", 0, 1, Fault::AnswerLost);
    patient.delete("a", Some(&etag)).await.unwrap();
    assert_eq!(double.object("a"), None);
}

#[tokio::test]
async fn a_body_goes_on_where_it_broke_off() {
    let (double, patient) = pair();
    let text: Vec<u8> = (0..1_000_000_u32).map(|at| (at % 251) as u8).collect();
    double.put_raw("a", text.clone(), Metadata::default());
    double.order("get", 0, 1, Fault::Truncated(400_000));
    double.order("get", 0, 1, Fault::Fails(StoreErrorKind::Unavailable));
    double.order("get", 0, 1, Fault::Truncated(100));
    let (head, bytes) = fetch(&*patient, "a", Some(10..900_000), None).await.unwrap();
    assert_eq!(head.size, 1_000_000);
    assert!(bytes[..] == text[10..900_000]);
    assert_eq!(double.count("get"), 4);
}

#[tokio::test]
async fn a_body_never_goes_on_with_another_version() {
    let (double, patient) = pair();
    double.put_raw("a", vec![1; 1000], Metadata::default());
    double.order("get", 0, 1, Fault::Truncated(400));
    let (_, mut body) = patient.get("a", None, None).await.unwrap();
    assert_eq!(body.next().await.unwrap().unwrap().len(), 400);
    double.put_raw("a", vec![2; 1000], Metadata::default());
    assert_eq!(body.next().await.unwrap().unwrap_err().kind, StoreErrorKind::Conflict);
    assert!(body.next().await.is_none());
}

#[tokio::test]
async fn damage_at_the_end_is_read_again_by_fetch_and_said_if_it_stays() {
    let (double, patient) = pair();
    double.put_raw("a", "12345", Metadata::default());
    double.order("get", 0, 1, Fault::Truncated(5));
    assert_eq!(fetch(&*patient, "a", None, None).await.unwrap().1, "12345");
    double.order("get", 0, usize::MAX, Fault::Truncated(5));
    assert_eq!(fetch(&*patient, "a", None, None).await.unwrap_err().kind, StoreErrorKind::Corrupt);
}

#[test]
fn the_etag_of_parts_is_as_s3_computes_it() {
    let part = |number, etag: &str| Part { number, etag: Etag(format!("\"{etag}\"")), checksum: None };
    // MD5 of "" twice.
    let empty = "d41d8cd98f00b204e9800998ecf8427e";
    let sum = etag_of(&[part(1, empty), part(2, empty)]).unwrap();
    assert_eq!(sum.0, "\"5873dd45edd01f09c1ef2e7819369e8e-2\"");
    assert_eq!(etag_of(&[part(1, "no md5")]), None);
}
