// Package logtest is the conformance suite of [broker.Log]: every line of the contract as a test that any log must pass, and a comparison of two logs under random operations. The
// model and the real log pass the same suite, so that what is tested on the model holds for the real one.
package logtest

import (
	"runtime"
	"testing"
	"testing/synctest"
	"time"

	"tidemark/broker"
	"tidemark/schema"
)

// Instance is one log to test. Its functions are optional: cases that need one which is nil are skipped. Whatever is opened is closed by the test's cleanup.
type Instance struct {
	Log broker.Log
	// OpenEdge opens another log on the same storage, as another edge does.
	OpenEdge func(t *testing.T) broker.Log
	// Restart closes all logs, stops and starts the storage, and opens Log anew.
	Restart func(t *testing.T) broker.Log
	// Truncate takes away envelopes of the session before first, as retention does, as far as the storage can, and returns the oldest seq that is left there. A log may go on with what it has in memory.
	Truncate func(t *testing.T, id schema.SessionID, first uint64) uint64
	// Settle waits until projections have caught up with the log. Nil where they never lag.
	Settle func(t *testing.T)
}

// Run runs the suite. Each case opens a log of its own inside a synctest bubble, so that time is fake and a goroutine left behind fails the case.
func Run(t *testing.T, open func(t *testing.T) Instance) {
	for _, c := range cases() {
		t.Run(c.name, func(t *testing.T) {
			// One bubble after the other: libraries pool what belongs to a bubble, and a pool is empty after two collections.
			runtime.GC()
			runtime.GC()
			synctest.Test(t, func(t *testing.T) {
				in := open(t)
				w := &world{T: t, in: in, log: in.Log, id: ID("case")}
				c.test(w)
			})
		})
	}
}

type testCase struct {
	name string
	test func(w *world)
}

// cases are the suite: the promises of each method, in the order of broker.Log.
func cases() []testCase {
	return []testCase{
		// Publish.
		{"PublishBeginsASession", testPublishBeginsASession},
		{"SeqsAreContiguous", testSeqsAreContiguous},
		{"StoredAsAccepted", testStoredAsAccepted},
		{"PublishAllOrNone", testPublishAllOrNone},
		{"PublishOfNothingIsRefused", testPublishOfNothing},
		{"PublishOfThousand", testPublishOfThousand},
		{"PublishInOrderSubmitted", testPublishInOrderSubmitted},
		{"PublishersAtOnce", testPublishersAtOnce},
		{"LargeEnvelopes", testLargeEnvelopes},
		{"UnknownFieldsSurvive", testUnknownFieldsSurvive},
		{"NamesOfAnyCharacters", testNamesOfAnyCharacters},
		{"I3_RepeatedIDs", testRepeatedIDs},
		{"I3_RepeatedIDsWindow", testRepeatedIDsWindow},
		{"I3_RepeatedInFlight", testRepeatedInFlight},
		{"I3_RepeatedInPart", testRepeatedInPart},
		{"I3_RepeatedInOnePublish", testRepeatedInOnePublish},
		{"I3_RepeatedExpected", testRepeatedExpected},
		{"I3_ProducerRepeats", testProducerRepeats},
		{"I3_ProducerRepeatsAnyTime", testProducerRepeatsAnyTime},
		{"I3_ManyProducers", testManyProducers},
		{"I6_ProducerGap", testProducerGap},
		{"I6_ProducerFenced", testProducerFenced},
		{"I6_ProducerOfItsSender", testProducerOfItsSender},
		{"I6_ProducerOfItsSenderAnyTime", testProducerOfItsSenderAnyTime},
		{"ExpectedSeq", testExpectedSeq},
		{"ExpectedSeqHasOneWinner", testExpectedSeqHasOneWinner},
		// Follow.
		{"FollowFromEveryStart", testFollowFromEveryStart},
		{"FollowSince", testFollowSince},
		{"FollowRefused", testFollowRefused},
		{"FollowBeforeTheFirst", testFollowBeforeTheFirst},
		{"FollowWithinBlocks", testFollowWithinBlocks},
		{"I4_CutAnywhere", testCutAnywhere},
		{"FollowByKinds", testFollowByKinds},
		{"FollowByKindsNone", testFollowByKindsNone},
		{"FollowMerged", testFollowMerged},
		{"FollowMany", testFollowMany},
		{"FollowWakes", testFollowWakes},
		{"FollowNextEndsWithContext", testFollowNextEndsWithContext},
		{"FollowCaughtUpOnce", testFollowCaughtUpOnce},
		{"FollowLimit", testFollowLimit},
		{"FollowEncoded", testFollowEncoded},
		{"I4_Truncated", testTruncated},
		{"I4_TruncatedUnderFollower", testTruncatedUnderFollower},
		// Session, Sessions, Delete.
		{"SessionIsLive", testSessionIsLive},
		{"SessionStatus", testSessionStatus},
		{"SessionKind", testSessionKind},
		{"SessionEnds", testSessionEnds},
		{"SessionRefusesAllOrNone", testSessionRefusesAllOrNone},
		{"SessionRemembersItsQuestion", testSessionRemembersItsQuestion},
		{"AnswerHasOneWinner", testAnswerHasOneWinner},
		{"AnswerNamesItsQuestion", testAnswerNamesItsQuestion},
		{"AnswerRepeated", testAnswerRepeated},
		{"I10_CancelEndsTheRun", testCancelEndsTheRun},
		{"I10_CancelBeforeTheRun", testCancelBeforeTheRun},
		{"AnsweredOnce", testAnsweredOnce},
		{"CallsNamedAnew", testCallsNamedAnew},
		{"I10_CancelledCalls", testCancelledCalls},
		{"I10_RunEndsOnce", testRunEndsOnce},
		{"SessionsListed", testSessionsListed},
		{"SessionsPaged", testSessionsPaged},
		{"DeleteEndsTheHistory", testDeleteEndsTheHistory},
		{"DeleteTellsFollowers", testDeleteTellsFollowers},
		{"StatusSaysReady", testStatusSaysReady},
		// Enter.
		{"SeatsAreLimited", testSeatsAreLimited},
		{"SeatsAreApart", testSeatsAreApart},
		{"SeatsWithoutLimit", testSeatsWithoutLimit},
		{"SeatsStayWhenTheContextEnds", testSeatsStayWhenTheContextEnds},
		{"SeatsHeldForLong", testSeatsHeldForLong},
		{"SeatsOverEdges", testSeatsOverEdges},
		{"SeatsHaveOneTaker", testSeatsHaveOneTaker},
		{"SeatsComeAndGo", testSeatsComeAndGo},
		{"SeatsEndWithARestart", testSeatsEndWithARestart},
		// Progress.
		{"ProgressIsStoredOnceASecond", testProgressOnceASecond},
		{"ProgressComesBeforeAnythingElse", testProgressBeforeAnythingElse},
		{"ProgressOnlyAloneIsReplaced", testProgressOnlyAlone},
		{"ProgressRepeated", testProgressRepeated},
		{"ProgressOfAFlood", testProgressOfAFlood},
		{"ProgressGoesWithItsSession", testProgressGoesWithItsSession},
		// More than one edge, and restarts.
		{"EdgesSeeEachOther", testEdgesSeeEachOther},
		{"I2_EdgesAppendAtOnce", testEdgesAppendAtOnce},
		{"I2_EdgesFloodAndTrickle", testEdgesFloodAndTrickle},
		{"I3_RepeatedOnAnotherEdge", testRepeatedOnAnotherEdge},
		{"I3_RetriesUnderContention", testRetriesUnderContention},
		{"I6_FencedOnAnotherEdge", testFencedOnAnotherEdge},
		{"I6_ProducersOverEdges", testProducersOverEdges},
		{"ExpectedSeqHasOneWinnerOverEdges", testExpectedSeqOverEdges},
		{"AnswerHasOneWinnerOverEdges", testAnswerOverEdges},
		{"EndedOnAnotherEdge", testEndedOnAnotherEdge},
		{"I10_CancelOverEdges", testCancelOverEdges},
		{"AnsweredOnceOverEdges", testAnsweredOnceOverEdges},
		{"ProgressOnAnotherEdge", testProgressOnAnotherEdge},
		{"ProgressOnTwoEdgesAtOnce", testProgressOnTwoEdgesAtOnce},
		{"ProgressLeftBehind", testProgressLeftBehind},
		{"ProgressBesideAFlood", testProgressBesideAFlood},
		{"ProgressDeletedOnAnotherEdge", testProgressDeletedOnAnotherEdge},
		{"DecidedOnWhatIsAcknowledged", testDecidedOnWhatIsAcknowledged},
		{"ResumeOnAnotherEdgeAtOnce", testResumeOnAnotherEdgeAtOnce},
		{"DeleteOnAnotherEdge", testDeleteOnAnotherEdge},
		{"DeleteTheHistoryThatIsThere", testDeleteTheHistoryThatIsThere},
		{"I1_RestartKeepsAll", testRestartKeepsAll},
		{"I3_RestartKnowsRetries", testRestartKnowsRetries},
		{"I6_ProducersRestored", testProducersRestored},
		{"ClosingStoresProgress", testClosingStoresProgress},
	}
}

// patience is how long a case waits for what must come, in the bubble's time.
const patience = 30 * time.Second
